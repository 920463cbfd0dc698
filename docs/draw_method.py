"""
Draws assets/method.png, the data flow of DisCo-Diff as it is in this repository.

    python docs/draw_method.py

Blue is what training alone does (Alg. 1), orange what sampling alone does (Alg. 3), black is what both
do. The boot is an image of the embedded data set, and the bag was drawn by the network in pretrained/;
a blur stands for the estimate. Coordinates are pixels of the finished picture, 1600 wide: text of 25
pixels can still be read where a page shows the picture at half its size.
"""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
SCALE = 2  # everything is drawn at twice its size and then reduced, which smooths edges
BLUE, ORANGE, BLACK, GREY = (20, 90, 170), (205, 85, 0), (40, 40, 40), (110, 110, 110)
CODES = [(230, 90, 0), (60, 160, 225), (0, 140, 100), (200, 60, 145),
         (0, 80, 165), (205, 165, 0), (120, 60, 160), (90, 90, 90)]
NUMBERS = (8, 1, 3, 10, 2, 5, 13, 0)  # a code: m = 8 latents, k = 16 values

canvas = Image.new("RGB", (1600 * SCALE, 760 * SCALE), "white")
draw = ImageDraw.Draw(canvas)


def text(x, y, words, size=28, colour=BLACK, anchor="mm"):
    draw.text((x * SCALE, y * SCALE), words, colour, ImageFont.load_default(size * SCALE), anchor)


def box(x, y, width, height, colour, *lines):
    """A rounded box around this centre: its first line is the idea, the others where the code is."""
    corners = [SCALE * v for v in (x - width / 2, y - height / 2, x + width / 2, y + height / 2)]
    draw.rounded_rectangle(corners, 14 * SCALE, tuple(230 + c // 10 for c in colour), colour, 3 * SCALE)
    for i, line in enumerate(lines):
        text(x, y + 34 * (i - (len(lines) - 1) / 2), line, 32 if i == 0 else 25, colour if i == 0 else BLACK)


def arrow(colour, *points, width=4):
    """Through these points, with a head at the last."""
    (x0, y0), (x1, y1) = points[-2:]
    along = np.array([x1 - x0, y1 - y0]) / np.hypot(x1 - x0, y1 - y0)
    tip, back, side = np.array([x1, y1]), -20 * along, 10 * np.array([-along[1], along[0]])
    shaft = [*points[:-1], tuple(tip + 0.7 * back)]
    draw.line([(x * SCALE, y * SCALE) for x, y in shaft], colour, width * SCALE, joint="curve")
    draw.polygon([tuple(SCALE * p) for p in (tip, tip + back + side, tip + back - side)], colour)


def picture(x, y, pixels, colour, size=140):
    """uint8 (28, 28) around this centre, in a frame."""
    side = size * SCALE
    corner = tuple(round(SCALE * v - side / 2) for v in (x, y))
    canvas.paste(Image.fromarray(pixels).resize((side, side), Image.NEAREST).convert("RGB"), corner)
    draw.rectangle((*corner, corner[0] + side, corner[1] + side), outline=colour, width=4 * SCALE)


def unet(x, y):
    """Bars for its levels, as high as their feature maps; those with attention have a dot, where the codes enter."""
    heights, xs = (230, 160, 100, 100, 160, 230), [x + 56 * i for i in range(6)]
    draw.line([SCALE * v for v in (xs[0] - 140, y, xs[4], y)], BLACK, 4 * SCALE)
    for left, height in zip(xs, heights):
        corners = [SCALE * v for v in (left - 17, y - height / 2, left + 17, y + height / 2)]
        draw.rounded_rectangle(corners, 6 * SCALE, (236, 236, 236), BLACK, 3 * SCALE)
    for left in xs[1:5]:
        draw.ellipse([SCALE * v for v in (left - 11, y - 11, left + 11, y + 11)], BLACK)


def main():
    # ----------------------------------------------------------------------------------------------------
    # images: a boot of the data set, with noise, denoised (blue); noise, and a bag that the network drew (orange)

    with gzip.open(ROOT / "datasets/embedded/t10k-images-idx3-ubyte.gz") as f:
        y_image = np.frombuffer(f.read(28 * 28 + 16), np.uint8, offset=16).reshape(28, 28)
    samples = np.asarray(Image.open(ROOT / "assets/pretrained.png").convert("L"))[::2, ::2]  # 10 rows of 16
    sample = samples[8 * 30 + 1:9 * 30 - 1, 12 * 30 + 1:13 * 30 - 1]
    noise = np.random.default_rng(0).standard_normal((28, 28))
    noisy = (y_image + 110 * noise).clip(0, 255).astype(np.uint8)
    denoised = np.asarray(Image.fromarray(y_image).resize((10, 10), Image.BILINEAR).resize((28, 28), Image.BICUBIC))
    static = (127 + 70 * noise[::-1]).clip(0, 255).astype(np.uint8)

    TOP, MIDDLE, BOTTOM = 150, 385, 620
    text(30, 34, "Training (Alg. 1)", 34, BLUE, "lm")
    text(30, 735, "Sampling (Alg. 3)", 34, ORANGE, "lm")

    # codes: from the encoder, or from the prior
    picture(110, TOP, y_image, BLUE)
    text(110, TOP + 92, "image y", 28, BLUE)
    box(365, TOP, 260, 150, BLUE, "Encoder", "a ViT", "model.py")
    text(110, BOTTOM - 18, "class", 28, ORANGE)
    text(110, BOTTOM + 18, "\"Bag\"", 28, ORANGE)
    box(365, BOTTOM, 260, 150, ORANGE, "Prior", "AR or SEDD", "prior.py, sedd.py")
    arrow(BLUE, (182, TOP), (232, TOP))
    arrow(ORANGE, (165, BOTTOM), (232, BOTTOM))
    column, step = 365, 42
    arrow(BLUE, (column, TOP + 76), (column, MIDDLE - 34))
    arrow(ORANGE, (column, BOTTOM - 76), (column, MIDDLE + 34))
    text(column + 16, TOP + 122, "Gumbel-Softmax", 26, BLUE, "lm")
    text(column + 16, BOTTOM - 118, "drawn, given the class", 26, ORANGE, "lm")
    for i, (number, colour) in enumerate(zip(NUMBERS, CODES)):
        left = column + step * (i - len(CODES) / 2)
        draw.rectangle([SCALE * v for v in (left + 2, MIDDLE - 28, left + step - 2, MIDDLE + 28)], colour)
        text(left + step / 2, MIDDLE, str(number), 24, (255, 255, 255))
    text(column - 4 * step - 14, MIDDLE - 16, "codes z", 30, BLACK, "rm")
    text(column - 4 * step - 14, MIDDLE + 20, "m = 8, k = 16", 22, GREY, "rm")

    # tokens, and where they enter the U-Net
    unet(1000, MIDDLE)
    box(740, MIDDLE, 300, 150, BLACK, "LatentTokens", "codebook, Transformer", "model.py")
    arrow(BLACK, (column + 4 * step + 6, MIDDLE), (588, MIDDLE))
    text(1140, MIDDLE - 122, "U-Net", 32)
    text(1140, MIDDLE - 88, "unet.py", 25)
    text(1140, MIDDLE + 103, "cross-attention", 25)
    text(1140, MIDDLE + 132, "after self-attention", 25)

    # training: one noisy image in, one estimate out
    picture(1000, TOP, noisy, BLUE)
    text(915, TOP - 20, "y + noise,", 28, BLUE, "rm")
    text(915, TOP + 18, "sigma, class", 28, BLUE, "rm")
    arrow(BLUE, (1000, TOP + 72), (1000, MIDDLE - 118))
    arrow(BLUE, (1280, MIDDLE - 118), (1280, TOP + 74))
    picture(1280, TOP, denoised, BLUE)
    text(1370, TOP - 50, "estimate D", 28, BLUE, "lm")
    text(1370, TOP + 4, "loss (Eq. 3):", 26, BLUE, "lm")
    text(1370, TOP + 40, "lambda |D - y|^2", 26, BLUE, "lm")

    # sampling: the sampler asks for D again and again
    picture(720, BOTTOM, static, ORANGE)
    text(720, BOTTOM + 92, "noise", 28, ORANGE)
    box(1140, BOTTOM, 420, 150, ORANGE, "Heun's method", "18 noise levels, 35 times D", "diffusion.py")
    arrow(ORANGE, (792, BOTTOM), (927, BOTTOM))
    arrow(ORANGE, (1000, BOTTOM - 76), (1000, MIDDLE + 118))
    arrow(ORANGE, (1280, MIDDLE + 118), (1280, BOTTOM - 78))
    text(985, BOTTOM - 98, "x, sigma, class", 26, ORANGE, "rm")
    text(1297, BOTTOM - 98, "D", 26, ORANGE, "lm")
    arrow(ORANGE, (1351, BOTTOM), (1425, BOTTOM))
    picture(1500, BOTTOM, sample, ORANGE)
    text(1500, BOTTOM + 92, "sample", 28, ORANGE)

    canvas.reduce(SCALE).quantize(128, dither=0).save(ROOT / "assets/method.png", optimize=True)


if __name__ == "__main__":
    main()
