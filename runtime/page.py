"""The curves of a run as SVG, and the rows that it gets most wrong as CSV and PNG."""

import csv
import html
import math

import numpy as np
import torch
import torch.nn.functional as F

import data
from runtime.checkpoint import atomic_write
from runtime.report import best_constant, best_row, watched_scores

CURVES = {"raw": ("validation, raw", "#0072b2"), "ema": ("validation, EMA", "#d55e00"),
          "train_eval": ("training, scored like validation", "#8fbc8f")}


def curves_svg(run):
    """Loss and watched scores over the epochs as an SVG, a panel each; floors are dashed lines."""
    history, args = run.history, run.args
    best = best_row(history, args.monitor)
    last = max(1, history[-1]["epoch"])
    title = f"{args.task}, variant {args.variant}: epoch {history[-1]['epoch']} of {args.epochs}"
    if best:
        kept = "last" if args.monitor == "last" else "best"
        title += f"; {kept} epoch {best['epoch']}, {run.task.watched(args)} {best['score']:.4f}"
    lines, top = [svg_text(10, 20, "black", title)], 50
    for score in dict.fromkeys(["loss", *watched_scores(history[-1], run.task, args)]):
        lines += svg_panel(score, panel_curves(history, run.floors, score), top, last)
        top += 210
    start = (f'<svg xmlns="http://www.w3.org/2000/svg" width="840" height="{top}" font-size="12" '
             'font-family="sans-serif" style="background: white">')
    return "\n".join([start, *lines, "</svg>\n"])


def panel_curves(history, floors, score):
    """[(label, colour, dashes, [(epoch, value)])] of one score."""
    curves, last = [], max(1, history[-1]["epoch"])
    if score == "loss":
        points = [(row["epoch"], row["train_loss"]) for row in history[1:]]
        curves.append(("training", "#009e73", "none", points))
    for key, (label, colour) in CURVES.items():
        points = [(row["epoch"], row[key][score]) for row in history if key in row]
        curves.append((label, colour, "none", points))
    for label, value in references(floors, score).items():
        curves.append((f"{label} {value:.4g}", "#777777", "6 4", [(0, value), (last, value)]))
    return curves


def references(floors, score):
    """{name: score} of the floors that have it; of the constants the best alone."""
    best, values = best_constant(floors).get(score), {}
    for name, scores in floors.items():
        value = scores.get(score, math.nan)
        if math.isfinite(value) and (value == best or not name.startswith("constant")):
            values[name] = value
    return values


def svg_panel(score, curves, top, last):
    """One panel, 500 x 150 pixels from (70, top): polylines, range of the values, and a legend."""
    values = [value for *_, points in curves for _, value in points if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    lines = [svg_text(70, top - 8, "black", score), svg_text(10, top + 10, "black", f"{high:.4g}"),
             svg_text(10, top + 150, "black", f"{low:.4g}"),
             svg_text(70, top + 166, "black", "epoch 0"),
             svg_text(556, top + 166, "black", str(last))]
    label_y = top + 10
    for label, colour, dashes, points in curves:
        places = []
        for epoch, value in points:
            if math.isfinite(value):
                y = top + 150 * (high - value) / (high - low or 1)
                places.append(f"{70 + 500 * epoch / last:.1f},{y:.1f}")
        if places:
            lines.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" '
                         f'stroke-dasharray="{dashes}"><title>{score}: {html.escape(label)}</title>'
                         "</polyline>")
            lines.append(svg_text(584, label_y, colour, label))
            label_y += 15
    return lines


def svg_text(x, y, colour, text):
    return f'<text x="{x}" y="{y}" fill="{colour}">{html.escape(text)}</text>'


def is_image(inputs):
    """Whether the inputs of a batch are images, float (b, 3, h, w) in [-1, 1]."""
    return torch.is_tensor(inputs) and inputs.ndim == 4


def write_images(path, inputs, columns=6):
    """Images as the networks take them, float (b, 3, h, w) in [-1, 1], as one PNG, row by row."""
    pixels = (inputs.float() * 127.5 + 127.5).round().clamp(0, 255).byte()
    pixels = F.pad(pixels, (2, 2, 2, 2), value=255).permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    grid = np.full((rows * columns, height, width, 3), 255, np.uint8)
    grid[:count] = pixels
    grid = grid.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    with atomic_write(path, "wb") as file:
        file.write(data.encode_png(grid.reshape(rows * height, columns * width, 3)))


def write_examples(folder, split, badness, columns):
    """All rows of a split as examples.csv, worst first; the first 24 images as examples.png."""
    order = np.argsort(-badness, kind="stable")  # NaN comes last
    names = getattr(split, "names", None)
    first = {"row": split.rows}
    if names is not None:
        first["name"] = [names[row] for row in split.rows]
    columns = first | columns | {"badness": badness}
    with atomic_write(folder / "examples.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for i in order:
            cells = [values[i] for values in columns.values()]
            writer.writerow([f"{x:.6g}" if isinstance(x, np.floating) else x for x in cells])
    inputs = split.batch(order[:24]).get("inputs")
    if is_image(inputs):
        write_images(folder / "examples.png", inputs)
