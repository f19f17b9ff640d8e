"""The configurations of a study's variants: checked before the first run, kept in the study's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lqkd.cli import LqkdCLI
from lqkd.errors import UsageError
from lqkd.files import write_text
from lqkd.parser import OneLineParser, condense
from lqkd.resume import differences
from lqkd.study.overrides import merge, nested

_OWN = ("run", "seed_everything", "ckpt_path")
"""Settings that a study chooses for each of its runs."""


class _Check(LqkdCLI):
    """Parses what ``fit`` would and goes no further."""

    def __init__(self, config: Path) -> None:
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=False,  # the process that starts runs draws no random numbers
            parser_class=OneLineParser,
            parser_kwargs={"exit_on_error": False},
            args=["fit", "--config", str(config)],
        )

    def _parse_ckpt_path(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def write_variant(folder: Path, name: str, base: Mapping[str, Any], overrides: Mapping[str, Any]) -> Path:
    """Write the configuration of a variant to ``folder/variants``, unless it is there already.

    Args:
        folder: of the study.
        name: of the variant.
        base: configuration with what all variants share, nested.
        overrides: of this variant, nested or dotted.

    Raises:
        UsageError: when it is no configuration of ``fit``, or runs of another one under this name exist.
    """
    config = merge(base, nested(overrides))
    for key in _OWN:
        if key in nested(overrides):
            raise UsageError(f"variants.{name}.{key} is not possible: a study chooses it for each of its runs")
        config.pop(key, None)
    target = folder / "variants" / f"{name}.yaml"
    if target.is_file():
        kept = yaml.safe_load(target.read_text(encoding="utf-8"))
        line = next((line for _, line in differences(kept, config, "")), None)
        if line is None:
            return target
        if (folder / "runs" / name).exists():
            raise UsageError(
                f"variants.{name} has runs in {folder} already but was changed: {line}; give it or the study another name"
            )
    text = yaml.safe_dump(config, sort_keys=False)
    proposed = target.with_name(f".{name}.yaml")
    write_text(proposed, text)
    try:
        _Check(proposed)
    except UsageError as error:
        raise UsageError(f"variants.{name}: {error}") from error
    except Exception as error:  # jsonargparse has several
        raise UsageError(f"variants.{name}: {condense(str(error))}") from error
    finally:
        proposed.unlink()
    write_text(target, text)
    return target
