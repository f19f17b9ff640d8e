"""Stage: images unpacked and in the cache, so that no later stage waits for their decoding."""

from __future__ import annotations

from benchmarks.gpu.data import NORMALISATION, SETS, data_folder, image_root
from benchmarks.gpu.plan import stage_parser
from benchmarks.gpu.results import why


def main() -> int:
    arguments = stage_parser(__doc__ or "").parse_args()
    folder, status = data_folder(arguments.data), 0
    for name, kind in SETS.items():
        try:
            kind(root=str(image_root(name, folder)), **NORMALISATION[name]).setup("fit")
            print(f"{name} is ready", flush=True)
        except Exception as error:  # the other set may still be there
            print(f"{name} cannot be used: {why(error)}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
