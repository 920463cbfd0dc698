"""
Pictures with Pillow alone: plots (`Axes`, `figure`), image grids (`save_grid`), training curves
(`save_curves`).
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoint import atomic

# eight colours that most people can tell apart; take indices modulo 8
COLOURS = np.array([(230, 90, 0), (60, 160, 225), (0, 140, 100), (200, 60, 145),
                    (0, 80, 165), (205, 165, 0), (120, 60, 160), (90, 90, 90)], np.uint8)
SCALE = 2  # drawn at twice the size, then reduced: this smooths edges


def ticks(low, high, log=False):
    """-> [(value, text)] of round numbers in low ... high

    Their distance is 1, 2 or 5 times a power of ten. A log scale of a decade or more has 1, 2 and 5
    times the powers of ten; a long one has powers of ten alone.
    """
    if log and high / low >= 10:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if len(decades) < 5 else (1,)
        values = [f * 10.0 ** e for e in decades[::math.ceil(len(decades) / 8)] for f in factors]
    else:
        power = 10 ** math.floor(math.log10((high - low) / 5))
        step = power * next(f for f in (1, 2, 5, 10) if 5 * f * power >= (high - low) * (1 - 1e-9))
        values = [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
    low, high = (edge + sign * 1e-9 * (edge if log else high - low) for edge, sign in ((low, -1), (high, 1)))
    texts = [f"{v:.0e}".replace("e+0", "e").replace("e-0", "e-") if log and not 1e-3 <= v < 1e5 else f"{v:.9g}"
             for v in values]
    return [(v, text) for v, text in zip(values, texts) if low <= v <= high]


class Axes:
    """One plot. Limits are (low, high); what lies outside is cut off. size: of the frame, in pixels. names: of
    x = 1, 2, ..., in place of numbers."""

    def __init__(self, xlim, ylim, title="", xlabel="", ylabel="", log_x=False, log_y=False, size=(320, 320), names=()):
        self.limits, self.logs = (xlim, ylim), (log_x, log_y)
        self.title, self.labels, self.names = title, (xlabel, ylabel), names
        self.inside = Image.new("RGB", tuple(SCALE * s for s in size), "white")
        self.draw = ImageDraw.Draw(self.inside)
        self.legend = []

    def at(self, points):
        """Data (N, 2) -> pixels (N, 2) of the frame."""
        pixels = []
        axes = zip(np.asarray(points, float).T, self.limits, self.logs, self.inside.size)
        for values, (low, high), log, size in axes:
            if log:
                values, low, high = np.log(np.maximum(values, 1e-300)), math.log(low), math.log(high)
            pixels.append(np.clip((values - low) / (high - low), -9, 9) * size)
        return np.stack([pixels[0], self.inside.height - pixels[1]], axis=1)

    def scatter(self, points, colours, radius=1.2, label=""):
        """points: (N, 2); colours: one (R, G, B), or (N, 3). label: of one colour"""
        r = SCALE * radius
        for (x, y), colour in zip(self.at(points), np.broadcast_to(colours, (len(points), 3))):
            self.draw.ellipse((x - r, y - r, x + r, y + r), tuple(colour))
        if label:
            self.legend.append((label, tuple(colours)))

    def line(self, points, colour, width=2.0, dots=False, label=""):
        """A line through points (N, 2); dots: a circle at each point."""
        pixels = self.at(points)
        self.draw.line([tuple(p) for p in pixels], tuple(colour), round(SCALE * width), joint="curve")
        if dots:
            self.scatter(points, colour, 1.4 * width)
        if label:
            self.legend.append((label, tuple(colour)))

    def arrows(self, points, vectors, colour, width=1.0):
        """Arrows from points (N, 2) to points + vectors."""
        for start, end in zip(self.at(points), self.at(np.asarray(points) + np.asarray(vectors))):
            back = (start - end) * 0.3
            side = np.array([-back[1], back[0]]) * 0.5
            for a, b in ((start, end), (end + back + side, end), (end + back - side, end)):
                self.draw.line((*a, *b), tuple(colour), round(SCALE * width))

    def image(self):
        """The plot with its frame, ticks, labels and legend, as a Pillow image."""
        font, (width, height) = ImageFont.load_default(13 * SCALE), self.inside.size
        left, top, right, bottom = (SCALE * v for v in (62, 28, 14, 46))
        canvas = Image.new("RGB", (left + width + right, top + height + bottom), "white")
        canvas.paste(self.inside, (left, top))
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((left, top, left + width, top + height), outline="black", width=SCALE)
        draw.text((left + width / 2, top / 2), self.title, "black", font, "mm")
        draw.text((left + width / 2, top + height + bottom - 4), self.labels[0], "black", font, "md")
        for axis in (0, 1):
            named = self.names and axis == 0
            for value, text in enumerate(self.names, 1) if named else ticks(*self.limits[axis], self.logs[axis]):
                x, y = self.at(np.array([[value, value]]))[0] + (left, top)
                if axis == 0:
                    draw.line((x, top + height, x, top + height + 5 * SCALE), "black", SCALE)
                    draw.text((x, top + height + 7 * SCALE), text, "black", font, "ma")
                else:
                    draw.line((left - 5 * SCALE, y, left, y), "black", SCALE)
                    draw.text((left - 7 * SCALE, y), text, "black", font, "rm")
        if self.labels[1]:  # on its side
            length = math.ceil(font.getlength(self.labels[1]))
            label = Image.new("RGB", (length, 18 * SCALE), "white")
            ImageDraw.Draw(label).text((0, 0), self.labels[1], "black", font)
            canvas.paste(label.rotate(90, expand=True), (0, top + (height - length) // 2))
        draw_legend(draw, self.legend, left, top)
        return canvas.reduce(SCALE)


def draw_legend(draw, labels, left, top):
    """labels: [(text, colour)]"""
    font = ImageFont.load_default(13 * SCALE)
    for i, (text, colour) in enumerate(labels):
        y = top + SCALE * (14 + 18 * i)
        draw.line((left + 8 * SCALE, y, left + 28 * SCALE, y), tuple(colour), 3 * SCALE)
        draw.text((left + 34 * SCALE, y), text, "black", font, "lm")


class Legend:
    """Stands beside the Axes of a figure that share it. labels: [(text, colour)]"""

    def __init__(self, labels, width=220):
        self.labels, self.width = labels, width

    def image(self):
        canvas = Image.new("RGB", (SCALE * self.width, SCALE * (46 + 18 * len(self.labels))), "white")
        draw_legend(ImageDraw.Draw(canvas), self.labels, 0, SCALE * 28)
        return canvas.reduce(SCALE)


def figure(rows):
    """Rows of Axes, or Legend -> one image."""
    images = [[axes.image() for axes in row] for row in rows]
    heights = [max(image.height for image in row) for row in images]
    canvas = Image.new("RGB", (max(sum(image.width for image in row) for row in images), sum(heights)), "white")
    for row, y in zip(images, np.cumsum([0, *heights])):
        for image, x in zip(row, np.cumsum([0, *(image.width for image in row)])):
            canvas.paste(image, (int(x), int(y)))
    return canvas


CURVES = {  # panel: keys of the training log
    "loss": ("loss", "held_out_loss"), "bits": ("bits", "held_out_bits"),
    "codes in use, of each latent": ("perplexity",), "KL divergence of each latent, bits": ("kld",),
    "entropy of the teacher's answers": ("teacher_entropy", "mean_entropy"), "share of distinct codes": ("distinct",),
    "norm of the gradients": ("grad_norm",), "learning rate": ("lr",)}


def save_curves(lines, path):
    """Draws a training log as one PNG; fewer than two lines give no picture.

    lines: dicts with "images", the number seen, and keys of `CURVES`. What is not finite is left out.
    """
    panels = []
    for title, keys in CURVES.items():
        curves = {}  # key: (N, 1 + number of lines), the images seen and the values
        for key in keys:
            rows = [(line["images"] / 1000, *np.atleast_1d(line.get(key, ()))) for line in lines]
            curve = [row for row in rows if 1 < len(row) == len(rows[-1]) and np.isfinite(np.array(row, float)).all()]
            if len({row[0] for row in curve}) > 1:
                curves[key] = np.array(curve)
        if curves:
            xs = np.concatenate([curve[:, 0] for curve in curves.values()])
            top = max(curve[:, 1:].max() for curve in curves.values()) * (1.4 if len(curves) > 1 else 1.1)  # a legend
            axes = Axes((xs.min(), xs.max()), (0, top or 1), title, "seen, thousands")
            for curve, key, colour in zip(curves.values(), curves, (COLOURS[4], COLOURS[0])):
                for i, y in enumerate(curve[:, 1:].T):
                    axes.line(np.stack([curve[:, 0], y], 1), colour if curve.shape[1] == 2 else COLOURS[i % 8], 1.5,
                              label=key.replace("_", "-", 1).replace("_", " ") if len(curves) > 1 else "")
            panels.append(axes)
    if panels:
        with atomic(path) as f:
            figure([panels[i:i + 3] for i in range(0, len(panels), 3)]).save(f, "png")


def save_grid(images, path, columns, titles=()):
    """Writes uint8 images (N, H, W, C) as one PNG, row by row, small ones enlarged. titles: of rows."""
    n, h, w, c = images.shape
    images = np.concatenate([images, np.full((-n % columns, h, w, c), 255, np.uint8)])
    images = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    grid = images.reshape(-1, columns, h + 2, w + 2, c).swapaxes(1, 2).reshape(-1, columns * (w + 2), c)
    picture = Image.fromarray(grid.squeeze(2) if c == 1 else grid)
    scale = max(1, 64 // h)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
    if titles:
        font = ImageFont.load_default(14)
        # class names come from folders, which may have any name
        titles = [" ".join(title.encode(errors="replace").decode().split())[:32] for title in titles]
        margin = 8 + max(math.ceil(font.getlength(title)) for title in titles)
        titled = Image.new(picture.mode, (margin + picture.width, picture.height), "white")
        titled.paste(picture, (margin, 0))
        for row, title in enumerate(titles):
            ImageDraw.Draw(titled).text((margin - 4, (row + 0.5) * (h + 2) * scale), title, "black", font, anchor="rm")
        picture = titled
    with atomic(path) as f:
        picture.save(f, "png")
