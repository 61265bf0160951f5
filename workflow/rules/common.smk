from pathlib import Path

from snakemake.exceptions import WorkflowError

from rad.preflight import check
from rad.settings import SELECTOR_SETTINGS
from rad.study import Study, StudyError
from rad.workflow import Helpers, go_offline, use_own_environment

use_own_environment()

SELECTION_RULES = sorted(
    str(path) for path in Path(workflow.basedir, "workflow", "rules", "selection").glob("*.smk")
)

try:
    STUDY = Study.from_config(
        config,
        external_selectors={Path(path).stem for path in SELECTION_RULES} - set(SELECTOR_SETTINGS),
    )
    if STUDY.offline:
        go_offline()
    # jobs of a cluster read this file again, on nodes that may have no network
    if workflow.is_main_process:
        check(STUDY)
except StudyError as error:
    raise WorkflowError(str(error)) from None

HELPERS = Helpers(STUDY)


pathvars:
    results=f"results/{STUDY.folder}",
    logs=f"logs/{STUDY.folder}",


wildcard_constraints:
    model=HELPERS.either(STUDY.models),
    base=HELPERS.either(STUDY.models),
    corpus=HELPERS.either(STUDY.corpora),
    mixer=HELPERS.either(STUDY.mixers),
    budget=r"[lhfb][0-9.]+",
    run=HELPERS.either(STUDY.run_table),
    scored=HELPERS.either(HELPERS.scored),
