r"""Whether an answer is the right one, as far as rules can tell: by its words, its number, or its option.

    by_rule(Claim("How much?", "1,000.", "1000"))  -> True
    by_rule(Claim("Which?", "(C)", "B"))           -> False
    by_rule(Claim("Who?", "a postman", "mailman")) -> None

Nothing here knows of servers or episodes.
"""

import re
from fractions import Fraction

from vlm_agents.types import Claim

LONGEST = 1000  # characters; what has more is no answer, and may be there to talk a judge round
TRIM = " \t\n.,;:!?\"'`*\u2018\u2019\u201c\u201d"  # around an answer it says nothing

MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
QUOTIENT = re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")
SPACING = re.compile(r"\$|\\[()\[\]!,;: ]")
FORMULA = re.compile(r"[\\^+*/=]")

WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
NUMBER = re.compile(
    rf"([+-]?)\s*(?:(?:({WHOLE})\s+)?({WHOLE})\s*/\s*({WHOLE})|({WHOLE}(?:\.\d*)?|\.\d+))\s*(%?)", re.ASCII
)
LETTER = re.compile(r"(?:option\s+)?\(?([a-z])(?:\)|[.:,]|\s|\Z)\s*(.*)", re.DOTALL)


def by_rule(claim: Claim) -> bool | None:
    """Is the answer right? None where the rules can't tell: of two texts that differ."""
    if hopeless(claim.answer):
        return False
    same = _same(claim.answer, claim.right)
    return _of_options(claim) if same is None else same


def canonical(claim: Claim) -> str:
    """The answer so that equal ones are equal texts: by option, number or words."""
    options = [_without_letter(index, option) for index, option in enumerate(claim.options)]
    if (option := _option(claim.answer, options)) is not None:
        return f"option {option}"
    number = _number(claim.answer)
    return _plain(claim.answer) if number is None else "".join(map(str, number))


def hopeless(answer: str) -> bool:
    """Is it empty, or so long that it is wrong whatever the question is?"""
    return not answer.strip(TRIM) or len(answer) >= LONGEST


def _same(answer: str, right: str) -> bool | None:
    """By words and numbers."""
    said, wanted = _number(answer), _number(right)
    if said is not None and wanted is not None and said[1] == wanted[1]:
        return said == wanted
    if said is None and wanted is None and _plain(answer) == _plain(right):
        return True
    return True if FORMULA.search(right) and _equal_formulas(answer, right) else None


def _plain(text: str) -> str:
    """The words alone: no LaTeX around them, no case, no needless blanks or punctuation."""
    return _unmarked(text).strip(TRIM)


def _unmarked(text: str) -> str:
    text = QUOTIENT.sub(r" \1/\2", MARKUP.sub(r"\1", MARKUP.sub(r"\1", text)))  # \boxed{\text{B}}
    return " ".join(SPACING.sub(" ", text).replace("\u2212", "-").casefold().split())


def _number(text: str) -> tuple[Fraction, str] | None:
    """Its value, and % where it is a percentage; None where the text is no number."""
    found = NUMBER.fullmatch(_unmarked(text).strip(TRIM.replace(".", "")).rstrip(TRIM))
    if not found:
        return None
    sign, whole, above, below, decimal, percent = (group and group.replace(",", "") for group in found.groups())
    if below and not int(below):
        return None
    value = Fraction(decimal) if decimal else int(whole or 0) + Fraction(int(above), int(below))
    return (-value if sign == "-" else value), percent


def _of_options(claim: Claim) -> bool | None:
    """By letter or by an option's own text; letters alone where the options aren't known."""
    options = [_without_letter(index, option) for index, option in enumerate(claim.options)]
    said, right = _option(claim.answer, options), _option(claim.right, options)
    return None if said is None or right is None else said == right


def _option(text: str, options: list[str]) -> int | None:
    """Which of the options the text names; None where it isn't clear."""
    named = {index for index, option in enumerate(options) if _same(text, option)}
    if found := LETTER.fullmatch(_plain(text)):
        index, rest = ord(found[1]) - ord("a"), found[2]
        if not rest or (index < len(options) and _same(rest, options[index])):
            named.add(index)
    return named.pop() if len(named) == 1 else None


def _without_letter(index: int, option: str) -> str:
    """An option may be written `B. red` itself."""
    found = LETTER.fullmatch(_plain(option))
    return found[2] if found and found[2] and ord(found[1]) - ord("a") == index else option


def _equal_formulas(answer: str, right: str) -> bool:
    """Does math-verify (the extra `math`), where it is installed, say so? That it finds no equality proves nothing."""
    try:
        from math_verify import parse, verify  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return verify(*(parse(f"${text.replace('$', '')}$") for text in (right, answer)))
