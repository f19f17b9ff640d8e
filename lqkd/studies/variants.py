"""The configurations of a study's variants: checked before the first run, kept in the study's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError

from lqkd.errors import UsageError
from lqkd.runs.lightning_cli import LqkdCLI
from lqkd.runs.parser import condense
from lqkd.runs.resume import differences
from lqkd.studies.overrides import merge, nested
from lqkd.utils.files import write_text
from lqkd.utils.yaml_text import load_yaml

_OWN = ("seed_everything", "ckpt_path", "run.root", "run.name", "run.version")
"""Settings that a study chooses for each of its runs."""


class _Check(LqkdCLI):
    """Parses what ``fit`` would and goes no further."""

    def __init__(self, config: Path) -> None:
        # The process that starts runs draws no random numbers.
        super().__init__(["fit", "--config", str(config)], seed=False, parser_kwargs={"exit_on_error": False})

    def again(self, config: Path) -> None:
        """Parse another file; to make the parser takes longer than to use it."""
        self.parse_arguments(self.parser, ["fit", "--config", str(config)])
        self.before_instantiate_classes()

    def _parse_ckpt_path(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class Variants:
    """Writes the configurations of variants to ``folder/variants``.

    Args:
        folder: of the study.
        base: configuration with what all variants share, nested.
    """

    def __init__(self, folder: Path, base: Mapping[str, Any]) -> None:
        self.folder, self.base = folder, base
        self._check: _Check | None = None

    def write(self, name: str, overrides: Mapping[str, Any]) -> None:
        """Write one, unless it is there already.

        Args:
            name: of the variant.
            overrides: of the base, nested or dotted.

        Raises:
            UsageError: when it is no configuration of ``fit``, or runs of another one under this name exist.
        """
        changes = nested(overrides)
        config = merge(self.base, changes)
        for key in _OWN:
            first, _, second = key.partition(".")
            if first in changes and (not second or second in changes[first]):
                raise UsageError(f"variants.{name}.{key} is not possible: a study chooses it for each of its runs")
            (config.get(first, {}) if second else config).pop(second or first, None)
        if not config.get("run", True):
            del config["run"]
        target = self.folder / "variants" / f"{name}.yaml"
        if target.is_file():
            kept = load_yaml(target.read_text(encoding="utf-8"), str(target))
            line = next((line for _, line in differences(kept, config, "")), None)
            if line is None:
                return
            if (self.folder / "runs" / name).exists():
                raise UsageError(
                    f"variants.{name} has runs in {self.folder} already but was changed: {line}; give it or the study "
                    "another name"
                )
        text = yaml.safe_dump(config, sort_keys=False)
        proposed = target.with_name(f".{target.name}")
        write_text(proposed, text)
        try:
            self._parse(proposed)
        except UsageError as error:
            raise UsageError(f"variants.{name}: {error}") from error
        except ArgumentError as error:
            raise UsageError(f"variants.{name}: {condense(str(error))}") from error
        finally:
            proposed.unlink()
        write_text(target, text)

    def _parse(self, config: Path) -> None:
        if self._check is None:
            self._check = _Check(config)
        else:
            self._check.again(config)
