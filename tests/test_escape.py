"""What strangers name things by is shown, and never obeyed."""

import pytest

from neuroal.escape import markdown, terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain λ ± text\n\tof two lines", "plain λ ± text\n\tof two lines"),
        ("\x1b[31mred\x1b[0m", r"\u001b[31mred\u001b[0m"),
        ("\x9b2J\x07\r", r"\u009b2J\u0007\u000d"),
        ("abc\u202edcba", r"abc\u202edcba"),
        ("\ud800", r"\ud800"),
    ],
)
def test_terminal(text: str, shown: str) -> None:
    assert terminal(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("linear_schedule 0.5", "linear_schedule 0.5"),
        ("a|b", r"a\|b"),
        ("<img src=x onerror=y> & </td>", "&lt;img src=x onerror=y&gt; &amp; &lt;/td&gt;"),
        ("[text](javascript:x) `code` **b**", r"\[text\](javascript:x) \`code\` \*\*b\*\*"),
        ("one\n\n# two\r\n- three", "one # two - three"),
        ("\\|", r"\\\|"),
        ("\x1b]0;x\x07", r"\\u001b\]0;x\\u0007"),
        (0.5, "0.5"),
    ],
)
def test_markdown(text: object, shown: str) -> None:
    assert markdown(text) == shown


def test_markdown_code() -> None:
    assert markdown("a/b_c.txt", code=True) == "`a/b_c.txt`"
    assert markdown("a`b|c\n<d>", code=True) == r"`a'b\|c <d>`"
