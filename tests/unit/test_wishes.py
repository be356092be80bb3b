"""What a header of wishes says."""

from serve.wishes import wishes


def test_those_of_one_weight_keep_their_order():
    assert wishes("fr, en-US, de;q=1.0, it;q=0.2") == ["fr", "en-us", "de", "it"]


def test_what_weighs_nothing_is_not_wanted():
    assert wishes("br, GZIP; q=0, identity;q=0.0") == ["br"]
