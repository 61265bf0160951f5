"""rad: how to turn a pretrained Transformer into a Transformer-SSM hybrid.

Importing this package imports neither torch nor transformers. The hybrids are registered with
transformers when a configuration is first opened through `AutoConfig` (as every
`AutoModelForCausalLM.from_pretrained` does), whichever of the two packages was imported first.
"""

from typing import Any

import wrapt

__version__ = "0.1.0"


def _wrap_auto_config(_module: Any) -> None:
    # the hybrids cannot be imported at this point: transformers may be in the middle of a chain
    # of imports that its own model classes are not yet through
    wrapt.wrap_function_wrapper(
        "transformers.models.auto.configuration_auto", "AutoConfig.from_pretrained", _register_first
    )


def _register_first(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    from rad.models.families import register

    register(*args, **kwargs)
    return wrapped(*args, **kwargs)


def __getattr__(name: str) -> Any:
    # `rad.convert(...)` without importing torch for `import rad`
    if name == "convert":
        from rad.models.store import convert_files

        return convert_files
    raise AttributeError(f"module 'rad' has no attribute {name!r}")


wrapt.register_post_import_hook(_wrap_auto_config, "transformers.models.auto.configuration_auto")
