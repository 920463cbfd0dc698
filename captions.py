"""
Captions of images, from which train_text.py learns: made from the data, or read from a file.

What is made names the class, and up to two things that are measured in the image: "a dark shirt with long sleeves",
"sneaker, low". The measures are simple, so that they can be taken of generated images too. An image has many captions:
a template is drawn, and which of its words are said.

Some combinations of a class and a word are unseen: images that are both can be left out of training. Class and word
are known from other images, and a prompt with both asks for what no caption has told of (DLC sec. 6).
"""

import numpy as np

from configurator import require

LEVEL = 40  # of 255: pixels above it belong to what is pictured
SHARES = (1 / 3, 1 / 2, 2 / 3)  # quantiles of a measure: words are for images below the first, and above the last
# (class modulo 10, 0 for its first measure or 1): the word that is left out. All are common in their classes: a light
# t-shirt, a narrow trouser, a dark pullover, dress and bag, a high ankle boot
UNSEEN = {(0, 0): 1, (1, 1): 0, (2, 0): 0, (3, 0): 0, (8, 0): 0, (9, 1): 1}
NOUNS = {"T-shirt/top": "t-shirt"}  # other classes have their names, in small letters
SAID = 0.75  # probability of a word
TEMPLATES = 5

# ----------------------------------------------------------------------------------------------------
# measures of greyscale images (N, H, W), 0 ... 255 -> (N,)


def extents(x):
    """-> (N, H), the pixels of each row from the first to the last that is pictured; 0 if there are none"""
    inside = x > LEVEL
    return np.where(inside.any(2), x.shape[2] - inside.argmax(2) - inside[:, :, ::-1].argmax(2), 0)


def brightness(x):
    """Mean of the pixels that are pictured."""
    inside = x > LEVEL
    return (x * inside).sum((1, 2)) / np.maximum(inside.sum((1, 2)), 1)


def width(x):
    """Mean extent of the rows with something in them."""
    rows = extents(x)
    return rows.sum(1) / np.maximum((rows > 0).sum(1), 1)


def height(x):
    """The number of rows with something in them: of shoes, a matter of heels and shafts."""
    return (extents(x) > 0).sum(1)


def sleeves(x):
    """Mean extent of the quarter of all rows from a little above the middle down, where only long sleeves reach."""
    rows = x.shape[1]
    return extents(x)[:, rows * 13 // 28:rows * 20 // 28].mean(1)


# measure: its words, for little and much of it; the classes that have it, () for all; whether what is much depends on
# the class
MEASURES = {
    brightness: (("dark", "light"), (), False),
    sleeves: (("short sleeves", "long sleeves"), ("T-shirt/top", "Pullover", "Coat", "Shirt"), False),
    width: (("narrow", "wide"), ("Trouser", "Dress", "Bag"), True),
    height: (("low", "high"), ("Sandal", "Sneaker", "Ankle boot"), True)}

# ----------------------------------------------------------------------------------------------------
# captions


def sentence(noun, words, template=0):
    """-> words about a noun as one of TEMPLATES sentences. Words with a space, as "long sleeves", are what it has."""
    adjectives, features = [word for word in words if " " not in word], [word for word in words if " " in word]
    thing, having = " ".join([*adjectives, noun]), "".join(f" with {feature}" for feature in features)
    a = "an" if thing[0] in "aeiou" else "a"
    return (f"{a} {thing}{having}",
            f"{thing}{having}",
            ", ".join([thing, *features]),
            ", ".join([f"{noun}{having}", *adjectives]),
            f"the {noun} is {' and '.join(adjectives)}{having}" if adjectives else f"this is {a} {noun}{having}"
            )[template]


class MadeCaptions:
    """Captions made of images uint8 (N, H, W, C), their labels int64 (N,), or None, and the classes' names.

    words: int8 (N, 2), for the first and second measure of an image's class: 0 little, 1 much, -1 neither.
    limits: float (classes, 2, 3), the measures' quantiles SHARES.
    """

    draws = 3  # uniform numbers that a caption takes

    def __init__(self, images, labels, classes):
        self.classes, self.labels = ["picture"] if labels is None else classes, labels
        if labels is None:
            self.labels = np.zeros(len(images), np.int64)
        self.measures = [[m for m, (_, of, _) in MEASURES.items() if not of or name in of] for name in self.classes]
        self.words, self.limits = np.full((len(images), 2), -1, np.int8), np.full((len(self.classes), 2, 3), np.nan)
        values = {m: self.measured(images, m) for m in {m for measures in self.measures for m in measures}}
        for c, slot, m in self.pairs():
            own = self.labels == c
            alike = [k for k, others in enumerate(self.measures) if (k == c if MEASURES[m][2] else m in others)]
            if own.any():
                self.limits[c, slot] = low, middle, high = np.quantile(values[m][np.isin(self.labels, alike)], SHARES)
                value = values[m][own]
                little, much = (value <= low) & (value < middle), (value >= high) & (value > middle)
                self.words[own, slot] = np.select([little, much], [0, 1], -1)

    def pairs(self):
        """Yields (class, 0 or 1, measure) for the measures of all classes."""
        for c, measures in enumerate(self.measures):
            for slot, m in enumerate(measures):
                yield c, slot, m

    @staticmethod
    def measured(images, m, at_once=10_000):
        """-> a measure (N,) of images uint8 (N, H, W, C), of which `at_once` are in memory as numbers"""
        parts = (images[i:i + at_once] for i in range(0, max(len(images), 1), at_once))
        return np.concatenate([m(part.mean(3) if part.shape[3] > 1 else part[..., 0]) for part in parts])

    def unseen(self):
        """-> bool (N,), images of combinations that training leaves out; none if there is but one class"""
        combined = [(self.labels % 10 == c) & (self.words[:, slot] == word) for (c, slot), word in UNSEEN.items()]
        return np.any(combined, axis=0) & (len(self.classes) > 1)

    def caption(self, c, words, template=0):
        """Of a class and its words, as in self.words."""
        said = [MEASURES[m][0][word] for m, word in zip(self.measures[c], words) if word >= 0]
        return sentence(NOUNS.get(self.classes[c], self.classes[c].lower()), said, template)

    def draw(self, indices, u):
        """-> captions (list of str) for images (B,), by uniform numbers u (B, 3) in [0, 1)"""
        words = np.where(u[:, 1:] < SAID, self.words[indices], -1)
        return [self.caption(*each) for each in zip(self.labels[indices], words, (TEMPLATES * u[:, 0]).astype(int))]

    def prompts(self):
        """Yields (class, 0 or 1, word, whether unseen, prompt) for all combinations of a class and a word."""
        for c, slot, _ in self.pairs():
            for word in (0, 1):
                unseen = len(self.classes) > 1 and UNSEEN.get((c % 10, slot)) == word
                yield c, slot, word, unseen, self.caption(c, [word if s == slot else -1 for s in (0, 1)])

    def agrees(self, images, c, slot, word):
        """-> bool (N,), whether images uint8 (N, H, W, C) are on this word's side of the median: half of all are"""
        value, middle = self.measured(images, self.measures[c][slot]), self.limits[c, slot, 1]
        return value > middle if word else value < middle

    def example(self):
        return self.caption(len(self.classes) - 1, (0, -1))


class FileCaptions:
    """Captions from the lines of a file: one for each image, in their order, with tabs between captions of one image.

    text: its content; count: of the images. Raises UserError if the lines don't fit.
    """

    draws = 1

    def __init__(self, path, text, count):
        lines = text.removesuffix("\n").split("\n")
        require(len(lines) == count,
                f"{path} has {len(lines)} lines, and there are {count} images: a line for each is wanted")
        self.captions = [[part.strip() for part in line.split("\t") if part.strip()] for line in lines]
        empty = next((i for i, captions in enumerate(self.captions) if not captions), None)
        require(empty is None, f"line {(empty or 0) + 1} of {path} is empty: each image needs a caption")

    def unseen(self):
        return np.zeros(len(self.captions), bool)

    def draw(self, indices, u):
        return [self.captions[i][int(x * len(self.captions[i]))] for i, x in zip(indices, u[:, 0])]

    def example(self):
        return self.captions[0][0]
