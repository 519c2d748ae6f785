"""mkdocs hook: the LaTeX of the pages ($…$ and $$…$$) becomes MathML, which browsers draw themselves: no script, no network.

A small part of LaTeX, the part that the pages use; anything else raises PluginError with page and formula, so that the build fails.
"""

from __future__ import annotations

import html
import re
from typing import Any

from mkdocs.exceptions import PluginError

CODE_OR_MATH = re.compile(
    r"""(?P<fence>^(?P<mark>[ ]*(?:```|~~~)).*?^(?P=mark))
      | (?P<code>(?P<ticks>`+).+?(?P=ticks))
      | \$\$(?P<block>.+?)\$\$
      | \$(?P<inline>[^\s$](?:[^$]*[^\s$])?)\$""",
    re.S | re.M | re.X,
)
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\s+|.", re.S)

LETTERS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ϵ", "varepsilon": "ε", "zeta": "ζ", "eta": "η", "theta": "θ", "kappa": "κ",
    "lambda": "λ", "mu": "μ", "nu": "ν", "xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "ϕ", "varphi": "φ", "chi": "χ", "psi": "ψ",
    "omega": "ω", "Gamma": "Γ", "Delta": "Δ", "Theta": "Θ", "Lambda": "Λ", "Sigma": "Σ", "Phi": "Φ", "Psi": "Ψ", "Omega": "Ω",
    "infty": "∞", "varnothing": "∅", "partial": "∂", "nabla": "∇", "ell": "ℓ",
}  # fmt: skip
SIGNS = {
    "in": "∈", "notin": "∉", "to": "→", "mapsto": "↦", "leftarrow": "←", "Rightarrow": "⇒", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠",
    "neq": "≠", "approx": "≈", "equiv": "≡", "sim": "∼", "propto": "∝", "cdot": "⋅", "times": "×", "pm": "±", "circ": "∘", "odot": "⊙", "top": "⊤", "perp": "⊥",
    "cup": "∪", "cap": "∩", "subset": "⊂", "setminus": "∖", "forall": "∀", "exists": "∃", "mid": "∣", "ldots": "…", "dots": "…", "cdots": "⋯",
    "colon": ":", "sum": "∑", "prod": "∏", "int": "∫", "langle": "⟨", "rangle": "⟩", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉",
    "ll": "≪", "gg": "≫", "lVert": "‖", "rVert": "‖", "lvert": "|", "rvert": "|",
}  # fmt: skip
FUNCTIONS = {"log", "ln", "exp", "max", "min", "arg", "argmax", "argmin", "sup", "inf", "det", "dim", "tanh", "cos", "sin", "Pr"}
ACCENTS = {"hat": "^", "widehat": "^", "bar": "¯", "overline": "¯", "tilde": "~", "dot": "˙", "vec": "→"}
SPACES = {",": 0.17, ":": 0.22, ";": 0.28, " ": 0.25, "quad": 1.0, "qquad": 2.0, "!": -0.17}
BIG = {"big", "Big", "bigl", "bigr", "Bigl", "Bigr", "bigg", "Bigg", "left", "right", "displaystyle", "limits"}
FENCES = {sign: sign for sign in "()[]|"} | {
    "\\{": "{", "\\}": "}", "\\|": "‖", "\\langle": "⟨", "\\rangle": "⟩", "\\lfloor": "⌊", "\\rfloor": "⌋", "\\lceil": "⌈", "\\rceil": "⌉",
}  # fmt: skip
DOUBLE = dict(zip("CEHNPQRZ", "ℂ𝔼ℍℕℙℚℝℤ", strict=True))
SCRIPT = dict(zip("BDEFHILMNRUX", "ℬ𝒟ℰℱℋℐℒℳ𝒩ℛ𝒰𝒳", strict=True))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with each page's text."""
    try:
        return convert(markdown)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def convert(markdown: str) -> str:
    """The page with its formulas as MathML; code is left alone. ValueError: a formula that is not understood."""

    def replace(found: re.Match[str]) -> str:
        if found["block"] is not None:
            return mathml(found["block"], display=True)
        return mathml(found["inline"], display=False) if found["inline"] is not None else found[0]

    return CODE_OR_MATH.sub(replace, markdown)


def mathml(latex: str, *, display: bool) -> str:
    """One formula as a <math> element on one line, in a <span>: Markdown takes a line that begins with <math> for a block of HTML."""
    reader = _Reader(latex, display)
    body = reader.row(until=None)
    return f'<span><math display="{"block" if display else "inline"}"><mrow>{body}</mrow></math></span>'


class _Reader:
    """Reads a formula from left to right."""

    def __init__(self, latex: str, display: bool) -> None:
        self.latex, self.display = latex, display
        self.tokens = [token for token in TOKEN.findall(latex) if not token.isspace()]

    def row(self, until: str | None) -> str:
        """Elements up to the token `until`, or to the end."""
        parts: list[str] = []
        while self.tokens:
            if self.tokens[0] == until:
                self.tokens.pop(0)
                return "".join(parts)
            parts.append(self.scripted())
        if until is not None:
            raise self.wrong(f"'{until}' is missing")
        return "".join(parts)

    def scripted(self) -> str:
        """One element with what is below, above and behind it."""
        limits = self.display and self.tokens[0] in ("\\sum", "\\prod", "\\max", "\\min", "\\argmax", "\\argmin")
        base = self.element()
        scripts: dict[str, str] = {}
        while self.tokens and self.tokens[0] in ("_", "^", "'"):
            mark = self.tokens.pop(0)
            if mark == "'":
                scripts["^"] = scripts.get("^", "") + "<mo>′</mo>"
            else:
                scripts[mark] = scripts.get(mark, "") + self.argument()
        if not scripts:
            return base
        low, high = (f"<mrow>{scripts[mark]}</mrow>" if mark in scripts else "" for mark in "_^")
        kind = ("under" if low else "") + ("over" if high else "") if limits else ("sub" if low else "") + ("sup" if high else "")
        return f"<m{kind}>{base}{low}{high}</m{kind}>"

    def argument(self) -> str:
        """A group in braces, or the next element alone (one digit of a number, as in LaTeX)."""
        if not self.tokens:
            raise self.wrong("something is missing at its end")
        if self.tokens[0].isdigit() and len(self.tokens[0]) > 1:
            digit, self.tokens[0] = self.tokens[0][0], self.tokens[0][1:]
            return f"<mn>{digit}</mn>"
        return self.element()

    def element(self) -> str:
        """A group, a letter, a number, a sign, or a command with its arguments."""
        if not self.tokens:
            raise self.wrong("something is missing at its end")
        token = self.tokens.pop(0)
        if token == "{":
            return f"<mrow>{self.row(until='}')}</mrow>"
        if token[0].isdigit():
            return f"<mn>{token}</mn>"
        if token.startswith("\\"):
            return self.command(token[1:])
        if token in ("}", "_", "^", "&", "#", "%"):
            raise self.wrong(f"'{token}' stands alone")
        return _identifier(token) if token.isalpha() else _sign("−" if token == "-" else token)

    def command(self, name: str) -> str:
        """What stands behind a backslash."""
        if name in LETTERS:
            return _identifier(LETTERS[name])
        if name in SIGNS:
            return _sign(SIGNS[name])
        if name in FUNCTIONS:
            apart = self.tokens and self.tokens[0] not in ("(", "[", "_", "^", "}")
            return f'<mrow><mi>{name}</mi><mspace width="0.17em"></mspace></mrow>' if apart else f"<mi>{name}</mi>"
        if name in SPACES:
            return f'<mspace width="{SPACES[name]}em"></mspace>'
        if name in BIG:
            fence = FENCES.get(self.tokens[0]) if self.tokens else None
            if fence is None:
                return ""
            self.tokens.pop(0)
            return f"<mo>{_escaped(fence)}</mo>"  # of its own, MathML stretches it
        if name in ACCENTS:
            return f'<mover accent="true">{self.argument()}<mo stretchy="false">{ACCENTS[name]}</mo></mover>'
        if name in ("frac", "tfrac", "dfrac"):
            return f"<mfrac>{self.argument()}{self.argument()}</mfrac>"
        if name == "sqrt":
            return f"<msqrt>{self.argument()}</msqrt>"
        if name in ("mathbb", "mathcal"):
            letters, table = self.text(), DOUBLE if name == "mathbb" else SCRIPT
            if letters not in table:
                raise self.wrong(f"\\{name}{{{letters}}} is not known")
            return _identifier(table[letters])
        if name in ("mathrm", "operatorname", "mathbf", "mathit"):
            variant = {"mathbf": "bold", "mathit": "italic"}.get(name, "normal")
            return f'<mi mathvariant="{variant}">{_escaped(self.text())}</mi>'
        if name == "text":
            return f"<mtext>{_escaped(self.text())}</mtext>"
        if name in ("{", "}", "|", "%", "_", "#", "&"):
            return _sign("‖" if name == "|" else name)
        raise self.wrong(f"\\{name} is not known")

    def text(self) -> str:
        """The characters of a group in braces, or the next one (spaces between words are lost: the tokens have none)."""
        first = self.tokens.pop(0) if self.tokens else ""
        if first != "{":
            return first
        characters: list[str] = []
        while self.tokens:
            token = self.tokens.pop(0)
            if token == "}":
                return "".join(characters)
            characters.append(token)
        raise self.wrong("'}' is missing")

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"the formula ${self.latex.strip()}$ is not understood by tools/math_pages.py: {what}")


def _identifier(letter: str) -> str:
    return f"<mi>{_escaped(letter)}</mi>"


def _sign(sign: str) -> str:
    return f'<mo stretchy="false">{_escaped(sign)}</mo>' if sign in FENCES.values() else f"<mo>{_escaped(sign)}</mo>"


def _escaped(text: str) -> str:
    """For HTML, and for Markdown, which reads the page afterwards (tables, emphasis, links)."""
    special = {character: f"&#{ord(character)};" for character in "|*_`[]\\~"}
    return "".join(special.get(character, html.escape(character)) for character in text)
