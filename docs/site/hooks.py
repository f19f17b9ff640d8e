"""Adds the repository's own pages to the site, under their paths in the repository, so that links work in both, and the
page of all settings, which is made from the code."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SOURCES = ("README.md", "CHANGELOG.md", "docs/*.md", "docs/gallery/*", "docs/*.py", "results/*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs once it has listed ``docs_dir``."""
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    sys.path.insert(0, str(Path(__file__).parent))
    import settings

    files.append(File.generated(config, "reference/settings.md", content=settings.page()))
    return files
