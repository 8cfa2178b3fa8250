"""The pictures of `--suite vlm` on one sheet, to be looked at: two slots of each dimension, clean and edited.

python benchmarks/vlm.py          # benchmarks/results/vlm_pictures.png
"""

import argparse
from pathlib import Path

from PIL import Image

from trl_trust.evaluation.vlm import BUILDERS, SIZE, vlm_items


COLUMNS, GAP = 4, 6
SCALE, PALETTE = 3 / 4, 48  # a picture of some tens of kilobytes


def contact_sheet(seed: int = 0) -> Image.Image:
    """Two pictures of each dimension, clean and edited ones, in rows of four."""
    found = [item for name in BUILDERS for slot in vlm_items(name, 4, seed) for item in slot]
    side = SIZE + GAP
    sheet = Image.new("RGB", (COLUMNS * side, -(-len(found) // COLUMNS) * side), (120, 120, 120))
    for i, item in enumerate(found):
        sheet.paste(item.images[0], (i % COLUMNS * side + GAP // 2, i // COLUMNS * side + GAP // 2))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vlm_pictures.png")
    args = parser.parse_args()
    sheet = contact_sheet(args.seed)
    small = sheet.resize([round(SCALE * side) for side in sheet.size], Image.Resampling.LANCZOS)
    small.quantize(PALETTE).save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()
