"""Recipes: what ships, how a study changes it, schedules, parameter groups, golden losses."""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from distillation_fixture import CONTEXT, job, random_corpus
from models_fixture import MIXERS, base_model, placement
from pydantic import ValidationError

from rad.distillation import loop, optimiser
from rad.distillation.schedules import rate
from rad.models.convert import convert
from rad.recipe_settings import recipe_names, shipped
from rad.settings import RecipeSettings, StageSettings

STEPS = 1000


# --- settings -------------------------------------------------------------------------------


def test_every_number_of_a_shipped_recipe_names_its_source() -> None:
    for name in recipe_names():
        lines = (files("rad") / "recipes" / f"{name}.yaml").read_text().splitlines()
        for line in lines:
            code, _, comment = line.partition("#")
            if re.search(r"\d", code):
                assert re.search(r"default|paper|code|section|step", comment), f"{name}: {line}"


def test_shipped_recipes_are_complete_and_stay_what_they_are() -> None:
    assert {"controlled", "kl_guided", "mamba_in_llama", "rad_kd", "rad_self", "radlads"} < {
        *recipe_names()
    }
    for name in recipe_names():
        recipe = RecipeSettings.model_validate({"use": name})
        assert len(recipe.stages) == len(shipped(name)["stages"])
        assert RecipeSettings.model_validate(recipe.model_dump(mode="json")) == recipe


def test_the_published_numbers_of_kl_guided_give_the_published_steps() -> None:
    align, logits = RecipeSettings(use="kl_guided").stages
    assert (align.steps(512), logits.steps(4096)) == (2034, 4577)  # as its configurations give them


def test_a_study_starts_from_a_shipped_recipe_and_changes_it() -> None:
    recipe = RecipeSettings.model_validate(
        {
            "use": "retrieval_aware",
            "tokens": 120_000,
            "override": {"all": {"batch_size": 8}, "logits": {"learning_rate": 0.5}},
            "keep": "best",
        }
    )
    assert [stage.tokens for stage in recipe.stages] == [50_000, 70_000]  # 5B : 7B
    assert [stage.batch_size for stage in recipe.stages] == [8, 8]
    assert [stage.learning_rate for stage in recipe.stages] == [1e-4, 0.5]
    assert (recipe.keep, recipe.autocast, recipe.origin) == ("best", True, "retrieval_aware")
    alone = RecipeSettings.model_validate({"use": "kl_guided", "skip": ["align"]})
    assert [stage.title for stage in alone.stages] == ["logits"]


def test_scaled_tokens_shrink_the_warm_up() -> None:
    recipe = RecipeSettings.model_validate({"use": "rad_self", "tokens": 80_000_000})
    assert recipe.stages[0].warmup_steps == 5  # 500 steps of 8B tokens


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"use": "nothing"}, r"no shipped recipe 'nothing'; there are controlled, kl_guided"),
        ({"use": "radlads", "skip": ["sft"]}, r"no stage 'sft' in this recipe; it has align"),
        ({"use": "radlads", "override": {"sft": {}}}, r"no stage 'sft'"),
        ({"use": "radlads", "stages": [{"tokens": 5}]}, r"use: radlads together with stages"),
        ({"tokens": 5}, r"there are no stages"),
        ({"stages": [{"tokens": 5, "trainable": "mixer"}]}, r"unknown set of parameters 'mixer'"),
        ({"stages": [{"tokens": 5, "accumulate": 3}]}, r"does not divide into 3 micro-batches"),
        ({"stages": [{"tokens": 5, "kl_weight": 0}]}, r"nothing to learn"),
        ({"use": "controlled", "override": {"all": {"lr": 1}}}, r"Extra inputs"),
    ],
)
def test_faults_are_named(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RecipeSettings.model_validate(recipe)


# --- schedules ------------------------------------------------------------------------------


def _rates(**settings: Any) -> list[float]:
    stage = StageSettings(tokens=1, warmup_fraction=0.1, final_fraction=0.2, **settings)
    return [rate(stage, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd", "stable_cosine_stable"])
def test_the_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    assert _rates(schedule=schedule)[:101] == pytest.approx(
        [(step + 1) / 100 for step in range(100)] + [1.0]
    )


def test_cosine_in_closed_form() -> None:
    expected = [
        0.2 + 0.8 * (1 + math.cos(math.pi * (step - 100) / 900)) / 2 for step in range(100, STEPS)
    ]
    assert _rates(schedule="cosine")[100:] == pytest.approx(expected)


def test_wsd_in_closed_form() -> None:
    rates = _rates(schedule="wsd", decay_fraction=0.2)
    assert rates[100:800] == [1.0] * 700
    assert rates[800:] == pytest.approx([1 - 0.8 * (step + 1) / 200 for step in range(200)])


def test_stable_cosine_stable_in_closed_form() -> None:
    rates = _rates(schedule="stable_cosine_stable", decay_from=0.5, decay_to=0.7)
    assert rates[100:501] == [1.0] * 401
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 200)) / 2 for step in range(200)]
    assert rates[500:700] == pytest.approx(expected)
    assert rates[700:] == pytest.approx([0.2] * 300)


def test_constant_stays() -> None:
    assert _rates(schedule="constant")[100:] == [1.0] * 900


def test_short_runs_still_train_at_their_peak() -> None:
    stage = StageSettings(tokens=1, warmup_steps=500)
    assert [rate(stage, step, 4) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


# --- parameters -----------------------------------------------------------------------------


def _student() -> Any:
    return convert(base_model(), placement("mixed"), MIXERS["mamba2"], "qkvo")


def test_only_the_mixers_train_when_asked() -> None:
    student = _student()
    chosen = optimiser.set_trainable(student, StageSettings(tokens=1, trainable="mixers"))
    assert set(chosen) == optimiser.mixer_parameters(student)
    assert all(".self_attn." in name for name in chosen)
    assert not any(".softmax." in name or "layers.0." in name for name in chosen)
    assert any(name.endswith("layers.2.self_attn.o_proj.weight") for name in chosen)


def test_trainable_sets_combine() -> None:
    student = _student()

    def chosen(which: Any) -> set[str]:
        return set(optimiser.set_trainable(student, StageSettings(tokens=1, trainable=which)))

    attention = chosen("attention")
    assert {name for name in attention if "layers.0." in name}  # a kept softmax layer's
    assert optimiser.mixer_parameters(student) < attention
    assert chosen(["mixers", "*.mlp.*"]) == optimiser.mixer_parameters(student) | chosen("*.mlp.*")
    assert chosen("all") == {name for name, _ in student.named_parameters()}
    with pytest.raises(ValueError, match=r"no parameter matches '\*.mpl.\*'"):
        chosen("*.mpl.*")


def test_groups_have_their_own_rates() -> None:
    stage = StageSettings.model_validate(
        {
            "tokens": 1,
            "learning_rate": 1e-5,
            "mixer_learning_rate": 7e-5,
            "final_learning_rate": 1e-6,
            "schedule": "cosine",
            "groups": [
                {"match": "*.mlp.*", "learning_rate": 3e-5, "weight_decay": 0.5},
                {"match": ["attention"], "learning_rate": 1e-4, "final_learning_rate": 2e-5},
            ],
        }
    )
    student = _student()
    adamw, names = optimiser.build(student, stage)
    assert sorted(names) == sorted(name for name, _ in student.named_parameters())
    optimiser.set_rate(adamw, stage, 1000, 1000)  # beyond the last step: the final rates
    assert optimiser.learning_rates(adamw) == pytest.approx(
        {"*.mlp.*": 0.05 * 3e-5, "attention": 2e-5, "rest": 1e-6}
    )
    named = {id(parameter): name for name, parameter in student.named_parameters()}
    for group in adamw.param_groups:
        for parameter in group["params"]:
            assert ("mlp" in named[id(parameter)]) == (group["title"] == "*.mlp.*")
            decay = 0.0 if parameter.dim() < 2 else 0.5 if group["title"] == "*.mlp.*" else 0.01
            assert group["weight_decay"] == decay


def test_vectors_decay_when_asked() -> None:
    adamw, _ = optimiser.build(_student(), StageSettings(tokens=1, decay_vectors=True))
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.01}


# --- golden losses --------------------------------------------------------------------------

# training loss of each step on the small model, with each recipe's own rates and stages
GOLDEN = json.loads(Path(__file__).with_name("golden_losses.json").read_text())


def recipe_losses(name: str, folder: Path) -> list[float]:
    """Training losses of 20 steps (a few more where stages do not share 20 evenly)."""
    shares = [stage["tokens"] for stage in shipped(name)["stages"]]
    parts = sum(share // math.gcd(*shares) for share in shares)
    steps = parts * math.ceil(20 / parts)
    recipe = RecipeSettings.model_validate(
        {
            "use": name,
            "tokens": steps * 4 * CONTEXT,
            "override": {"all": {"batch_size": 4}},
        }
    )
    trained = job(random_corpus(folder), stages=recipe.stages, measure=None, log_points=steps)
    return [record["train_loss"] for record in loop.train(trained)[1:]]


@pytest.mark.parametrize("name", recipe_names())
def test_golden_losses(name: str, tmp_path: Path) -> None:
    assert recipe_losses(name, tmp_path / "corpus") == pytest.approx(GOLDEN[name], abs=1e-4)
