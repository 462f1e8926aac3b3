"""How far images are apart; and contact sheets: many in one, with words below each where there are any."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_CELL = 96  # pixels; smaller images are enlarged by a whole factor when they are labelled
INK = (60, 60, 60)
LONGEST_WORD = 200  # characters


def psnr(images: Tensor, rebuilt: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images in dB: 2 x (B C H W) -> (B,); at most 100, which means equal."""
    mse = (images.double() - rebuilt.double()).div_(255).square_().mean((1, 2, 3))
    return -10.0 * mse.clamp(min=1e-10).log10()


def make_grid(images: Tensor, columns: int | None = None, padding: int = 2, background: int = 255) -> Tensor:
    """Images uint8 (B, 3, H, W) row by row in a near-square sheet with a margin: uint8 (3, H', W')."""
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    cells = images.new_full((rows * columns, channels, height + padding, width + padding), background)
    cells[:count, :, padding:, padding:] = images
    sheet = cells.view(rows, columns, channels, height + padding, width + padding)
    sheet = sheet.permute(2, 0, 3, 1, 4).reshape(channels, rows * (height + padding), columns * (width + padding))
    return torch.nn.functional.pad(sheet, (0, padding, 0, padding), value=background)


def labelled_grid(images: Tensor, labels: Sequence[str], columns: int | None = None) -> Tensor:
    """`make_grid` with a label of up to four lines below each image; tiny images are enlarged to a readable size."""
    factor = max(1, math.ceil(MIN_CELL / images.shape[-1]))
    images = images.cpu().repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    strips = _label_strips(labels, images.shape[-1])
    return make_grid(torch.cat([images, strips], dim=2), columns, padding=8)


def axes_grid(images: Tensor, rows: Sequence[str], columns: Sequence[str]) -> Tensor:
    """Images uint8 (R C 3 H W) with a name left of each row and above each column: uint8 (3, H', W')."""
    factor = max(1, math.ceil(MIN_CELL / images.shape[-1]))
    images = images.cpu().repeat_interleave(factor, dim=3).repeat_interleave(factor, dim=4)
    height, width = images.shape[-2:]
    heads = _label_strips(columns, width)  # C 3 h W
    names = torch.full((len(rows), 3, height, width), 255, dtype=torch.uint8)
    strips = _label_strips(rows, width)[:, :, :height]
    top = (height - strips.shape[2]) // 2
    names[:, :, top : top + strips.shape[2]] = strips
    corner = torch.full_like(heads[:1], 255)
    head = make_grid(torch.cat([corner, heads]), len(columns) + 1, padding=4)
    cells = torch.cat([names[:, None], images], dim=1).flatten(0, 1)
    return torch.cat([head, make_grid(cells, len(columns) + 1, padding=4)], dim=1)


def _label_strips(labels: Sequence[str], width: int) -> Tensor:
    """White strips with centred text, just high enough for the longest label: uint8 (B, 3, h, width)."""
    from PIL import Image, ImageDraw, ImageFont  # only here: torch is enough for everything else

    size = min(max(11, width // 10), 18)
    font = ImageFont.load_default(size)
    wrapped = [_wrap(label, lambda text: font.getlength(text) <= width) for label in labels]
    height = (size + 4) * max(len(lines) for lines in wrapped) + 4
    strips = []
    for lines in wrapped:
        strip = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(strip)
        for row, line in enumerate(lines):
            left = (width - font.getlength(line)) / 2
            draw.text((left, 4 + row * (size + 4)), line, font=font, fill=INK)
        strips.append(torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(height, width, 3))
    return torch.stack(strips).permute(0, 3, 1, 2)


def _wrap(text: str, fits, lines: int = 4) -> list[str]:
    """At most `lines` lines that fit, the last one ending in an ellipsis where words were left out."""
    words, out = text.split(), []
    while words and len(out) < lines:
        count = 1
        while count < len(words) and fits(" ".join(words[: count + 1])):
            count += 1
        out.append(" ".join(words[:count]))
        words = words[count:]
    if out and (words or not fits(out[-1])):
        last = out[-1][:LONGEST_WORD]
        while last and not fits(last + "…"):
            last = last[:-1]
        out[-1] = last.rstrip() + "…"
    return out or [""]
