"""The docs' pictures can be taken anew, and those that are there are of the size that they would have."""

from pictures import DOCS, IN_DOCS, PHONE, SIZES, take
from PIL import Image


def test_they_are_taken_of_both_pages(browser, tmp_path):
    take(browser, tmp_path, ["experts", "compare-phone-dark"])
    taken = {path.stem: Image.open(path).convert("L") for path in tmp_path.glob("*.png")}
    assert {name: picture.size for name, picture in taken.items()} == {
        "experts": SIZES["experts"],
        "compare-phone-dark": PHONE,
    }
    assert taken["experts"].getpixel((5, 400)) > 240 and taken["compare-phone-dark"].getpixel((5, 400)) < 50


def test_the_docs_have_them():
    sizes = {name: Image.open(DOCS / f"{name}.png").size for name in IN_DOCS}
    assert sizes == {**SIZES, "experts-phone": PHONE}
