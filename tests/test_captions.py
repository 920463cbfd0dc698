"""Captions: measures of drawn shapes, sentences, unseen combinations, files."""
import numpy as np
import pytest

import data
from captions import MEASURES, FileCaptions, MadeCaptions, brightness, height, sentence, sleeves, width
from configurator import UserError


def test_measures_of_a_drawn_shape():
    """A body 10 wide and 20 high of brightness 100, with sleeves of 24 in the rows 12 to 15, and faint noise around."""
    x = np.full((2, 28, 28), 40, np.uint8)
    x[0, 4:24, 9:19] = 100
    x[0, 12:16, 2:26] = 100
    assert brightness(x).tolist() == [100, 0] and height(x).tolist() == [20, 0]
    assert width(x)[0] == (16 * 10 + 4 * 24) / 20 and width(x)[1] == 0
    assert sleeves(x)[0] == (3 * 24 + 4 * 10) / 7
    x[0, 20, 12:16] = 0  # a gap does not end a row
    assert height(x)[0] == 20 and width(x)[0] == (16 * 10 + 4 * 24) / 20


def test_sentences():
    words = ["dark", "long sleeves"]
    assert [sentence("coat", words, t) for t in range(5)] == [
        "a dark coat with long sleeves", "dark coat with long sleeves", "dark coat, long sleeves",
        "coat with long sleeves, dark", "the coat is dark with long sleeves"]
    assert [sentence("ankle boot", [], t) for t in range(5)] == [
        "an ankle boot", "ankle boot", "ankle boot", "ankle boot", "this is an ankle boot"]
    assert sentence("ankle boot", ["light", "high"], 4) == "the ankle boot is light and high"


@pytest.fixture(scope="module")
def made():
    images, labels, _ = data.load("fashion-mnist-10k")
    return MadeCaptions(images, labels, data.FASHION), images, labels


def test_words_are_for_a_third_each(made):
    """Of all images for brightness, of each class for width and height; words are on their sides of the median."""
    captions, images, labels = made
    assert [(captions.words[:, 0] == word).mean() for word in (0, 1)] == pytest.approx([1 / 3, 1 / 3], abs=0.001)
    for c, slot, measure in captions.pairs():
        own = labels == c
        if MEASURES[measure][2]:
            shares = [(captions.words[own, slot] == word).mean() for word in (0, 1)]
            assert min(shares) >= 0.33 and max(shares) < 0.5  # heights are whole numbers
        for word in (0, 1):
            said = own & (captions.words[:, slot] == word)
            assert captions.agrees(images[said], c, slot, word).all()
            assert not captions.agrees(images[said], c, slot, 1 - word).any()
    long = (captions.words[:, 1] == 1)[labels == 2].mean(), (captions.words[:, 1] == 1)[labels == 0].mean()
    assert long[0] > 0.5 and long[1] < 0.1  # pullovers have long sleeves, T-shirts have not


def test_captions_are_drawn(made):
    """Of an image with two words: each template with both, one or none, as often as said."""
    captions, _, labels = made
    i = next(i for i in range(100) if (captions.words[i] >= 0).all())
    both = [MEASURES[m][0][word] for m, word in zip(captions.measures[labels[i]], captions.words[i])]
    noun = captions.classes[labels[i]].lower()
    many = captions.draw(np.full(4000, i), np.random.default_rng(0).random((4000, 3)))
    assert {*many} == {sentence(noun, words, t) for t in range(5) for words in ([], both[:1], both[1:], both)}
    assert np.mean([both[0] in text for text in many]) == pytest.approx(0.75, abs=0.03)
    assert np.mean([both[0] in text and both[1] in text for text in many]) == pytest.approx(0.5625, abs=0.03)
    assert np.mean([text.startswith(("the ", "this ")) for text in many]) == pytest.approx(0.2, abs=0.03)


def test_unseen_combinations(made):
    """Prompts name all combinations; the unseen ones are those of the images that are left out."""
    captions, _, labels = made
    prompts = list(captions.prompts())
    unseen = [prompt for *_, is_unseen, prompt in prompts if is_unseen]
    assert len(prompts) == 40 and unseen == ["a light t-shirt", "a narrow trouser", "a dark pullover", "a dark dress",
                                             "a dark bag", "a high ankle boot"]
    left_out = np.zeros(len(labels), bool)
    for c, slot, word, is_unseen, _ in prompts:
        left_out |= is_unseen & (labels == c) & (captions.words[:, slot] == word)
    assert np.array_equal(left_out, captions.unseen()) and 0.15 < left_out.mean() < 0.25


def test_data_without_labels_and_in_colour():
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    captions = MadeCaptions(images, None, [])
    assert not captions.unseen().any() and [prompt for *_, prompt in captions.prompts()] == ["a dark picture", "a light picture"]
    assert captions.draw(np.arange(2), np.zeros((2, 3))) == [captions.caption(0, words) for words in captions.words[:2]]
    assert np.array_equal(MadeCaptions.measured(images, height, at_once=7), height(images.mean(3)))
    assert (MadeCaptions(images[:1].repeat(9, 0), None, []).words == -1).all()  # none is darker than another


def test_captions_from_a_file():
    captions = FileCaptions("c.txt", "one\ttwo\nthree \n", 2)
    assert captions.draw([0, 0, 1], np.array([[0.4], [0.6], [0.9]])) == ["one", "two", "three"]
    assert captions.unseen().tolist() == [False, False] and captions.example() == "one"
    with pytest.raises(UserError, match="c.txt has 2 lines, and there are 3 images: a line for each is wanted"):
        FileCaptions("c.txt", "one\ntwo\n", 3)
    with pytest.raises(UserError, match="line 2 of c.txt is empty: each image needs a caption"):
        FileCaptions("c.txt", "one\n\t\nthree", 3)
