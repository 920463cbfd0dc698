"""
Random views of images, in batches on the device: crops, flips, colours, blur (BYOL; DINO).

`draw_crops` and `draw_colours` draw what happens to each image; `crop` and `recolour` do it, and have no
randomness of their own. So each process can draw for the whole batch, and take its rows.

Images are float (B, C, H, W) in [-1, 1], C = 1 or 3. With one channel there is no saturation, hue or grey.
"""

import torch
import torch.nn.functional as F


def draw_crops(shape, area, flip, g, tries=10, aspect=4 / 3):
    """-> {name: tensor of this shape} for `crop`. area: (least, largest) share of the image; flip: its probability

    Areas are uniform, aspects log-uniform in 3/4 ... 4/3. The first of ten draws that fits into the image is taken,
    else the whole image. Lengths are in units of the image's side.
    """
    least, largest = area
    u = torch.rand(2, tries, *shape, device=g.device, generator=g)
    size, ratio = least + (largest - least) * u[0], aspect ** (2 * u[1] - 1)
    sides = torch.stack([(size * ratio).sqrt(), (size / ratio).sqrt()])  # (2, tries, *shape)
    fits = sides.amax(0) <= 1
    chosen = sides.gather(1, fits.int().argmax(0).expand(2, 1, *shape)).squeeze(1)
    wide, high = torch.where(fits.any(0), chosen, 1)
    left, top, coin = torch.rand(3, *shape, device=g.device, generator=g)
    return dict(left=left * (1 - wide), top=top * (1 - high), wide=wide, high=high, flip=coin < flip)


def crop(y, size, left, top, wide, high, flip):
    """Cuts a box out of each image, resizes it (bicubic), and mirrors it where flip is true; boxes and flip: (B,)

    -> (B, C, size, size)
    """
    zero, sign = torch.zeros_like(left), torch.where(flip, -1, 1)
    # from the crop's coordinates, -1 ... 1, to the image's
    to_image = torch.stack([sign * wide, zero, 2 * left + wide - 1, zero, high, 2 * top + high - 1], 1)
    grid = F.affine_grid(to_image.unflatten(1, (2, 3)), (len(y), 1, size, size), align_corners=False)
    return F.grid_sample(y, grid, "bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)


def draw_colours(shape, jitter, jitter_prob, grey_prob, blur_prob, blur_sigma, solarise_prob, g):
    """-> {name: tensor of this shape} for `recolour`

    jitter: the largest changes of brightness, contrast and saturation, which are factors around 1, and of hue, in
    turns; blur_sigma: (least, largest), in pixels; blur_prob, solarise_prob: tensors, for the crops may differ.
    """
    u = 2 * torch.rand(4, *shape, device=g.device, generator=g) - 1
    jittered, grey, blurred, solarised, sigma = torch.rand(5, *shape, device=g.device, generator=g)
    changes = (torch.where(jittered < jitter_prob, most * v, 0) for most, v in zip(jitter, u))
    brightness, contrast, saturation, hue = changes
    least, largest = blur_sigma
    return dict(brightness=1 + brightness, contrast=1 + contrast, saturation=1 + saturation, hue=hue,
                grey=grey < grey_prob, sigma=torch.where(blurred < blur_prob, least + (largest - least) * sigma, 0),
                solarise=solarised < solarise_prob)


def recolour(y, brightness, contrast, saturation, hue, grey, sigma, solarise):
    """Jitter (torchvision shuffles its four steps, here their order is fixed), grey, blur, solarise; all but y: (B,)

    -> (B, C, H, W)
    """
    brightness, contrast, saturation, hue, grey, solarise = (
        t[:, None, None, None] for t in (brightness, contrast, saturation, hue, grey, solarise))
    y = ((y + 1) / 2 * brightness).clamp(0, 1)
    y = torch.lerp(luma(y).mean((2, 3), keepdim=True), y, contrast).clamp(0, 1)
    if y.shape[1] == 3:
        y = shift_hue(torch.lerp(luma(y), y, saturation).clamp(0, 1), hue)
        y = torch.where(grey, luma(y), y)
    y = blur(y, sigma)
    return 2 * torch.where(solarise & (y >= 0.5), 1 - y, y) - 1


def luma(y):
    """Brightness as the eye sees it (ITU-R 601). (B, C, H, W) -> (B, 1, H, W)"""
    weights = y.new_tensor([0.299, 0.587, 0.114] if y.shape[1] == 3 else [1.0])
    return (y * weights[:, None, None]).sum(1, keepdim=True)


def shift_hue(y, turns):
    """Colours in [0, 1] with their hue, in HSV, shifted. y: (B, 3, H, W); turns: (B, 1, 1, 1) -> (B, 3, H, W)"""
    value, low = y.amax(1, keepdim=True), y.amin(1, keepdim=True)
    chroma = value - low
    r, g, b = (y / chroma.clamp(min=1e-8)).split(1, 1)
    red, green = y[:, :1] == value, y[:, 1:2] == value
    sixths = torch.where(red, g - b, torch.where(green, b - r + 2, r - g + 4))
    k = (sixths + 6 * turns + y.new_tensor([5, 3, 1])[:, None, None]) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(y, sigma):
    """Gaussian blur, as products with a matrix for rows and columns. y: (B, C, H, H); sigma: (B,) in
    pixels, 0 for none. -> (B, C, H, H)"""
    at = torch.arange(y.shape[2], device=y.device)
    apart = (at[:, None] - at) / sigma.clamp(min=0.01)[:, None, None, None]
    weights = (-apart ** 2 / 2).softmax(-1)  # (B, 1, H, H)
    return weights @ y @ weights.mT
