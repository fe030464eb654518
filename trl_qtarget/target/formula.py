"""Trusts and scales written as formulas, `min(1, p / 0.1)`: a small grammar, evaluated on statistics of the tokens.

Python's parser makes a tree of the text, every node of which has to be one that a formula may hold; nothing is ever
evaluated by Python. A formula is a design like any other: it says which statistics it reads, and only these are
computed. All of them are numbers per token, so a formula runs in the fused loss like a built-in design.
"""

import ast
import inspect
import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .registry import KNOBS, TILE_STATISTICS
from .shown import nearest
from .tile import Tile


# A formula is a line of a configuration, which may come from anywhere.
MAX_LENGTH, MAX_DEPTH, MAX_CONSTANT, MAX_EXPONENT = 500, 30, 1e6, 100.0


@dataclass(frozen=True)
class Variable:
    """A name that a formula may use: what it means, how a tile gives it `[n]`, and what has to be at hand for it."""

    meaning: str
    read: Callable[[Tile], Tensor]
    uses_prior: bool = False
    uses_token_weights: bool = False


VARIABLES = {
    "p": Variable("p_y, the policy's probability of the label", lambda tile: tile.label_probs),
    "log_p": Variable("log p_y, in nats", lambda tile: tile.label_log_probs),
    "r": Variable("the prior's probability of the label", lambda tile: tile.prior_label_log_probs.exp(), True),
    "log_r": Variable("log r, in nats", lambda tile: tile.prior_label_log_probs, True),
    "H": Variable("entropy of the policy, in nats", lambda tile: tile.policy.entropy),
    "H_prior": Variable("entropy of the prior, in nats", lambda tile: tile.mixture(prior=1.0).entropy, True),
    "rank": Variable("how many tokens are at least as probable as the label", lambda tile: tile.rank),
    "margin": Variable("the label's logit minus the best other one", lambda tile: tile.margin),
    "collision": Variable("Σ p², the probability that two draws from the policy agree", lambda tile: tile.collision),
    "p_max": Variable("the policy's largest probability", lambda tile: tile.largest_prob),
    "weight": Variable("the dataset's weight of the token", lambda tile: tile.token_weights, False, True),
    "progress": Variable(
        "share of the training that is done", lambda tile: torch.full_like(tile.label_log_probs, tile.progress)
    ),
}
# Where a probability may have underflowed, its logarithm has not.
_LOGARITHMS = {"p": "log_p", "r": "log_r"}


def _nonzero(value: Tensor) -> Tensor:
    """Zeros become the smallest number: the one guard of logarithms, divisors and negative powers."""
    return torch.where(value == 0, torch.finfo(value.dtype).tiny, value)


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.where(exponent < 0, _nonzero(base), base) ** exponent


def _kept_nan(result: Tensor, *operands: Tensor) -> Tensor:
    """NaN where an operand is: what is not known is neither true nor false."""
    return reduce(lambda kept, operand: torch.where(operand.isnan(), operand, kept), operands, result)


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left / _nonzero(right),
    ast.Pow: _power,
}
_COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
# Name: (fewest arguments, most, function).
_FUNCTIONS = {
    "min": (2, MAX_LENGTH, lambda *values: reduce(torch.minimum, values)),
    "max": (2, MAX_LENGTH, lambda *values: reduce(torch.maximum, values)),
    "exp": (1, 1, torch.exp),
    "log": (1, 1, lambda value: _nonzero(value).log()),
    "sqrt": (1, 1, torch.sqrt),
    "abs": (1, 1, torch.abs),
    "sigmoid": (1, 1, torch.sigmoid),
    "clip": (3, 3, lambda value, low, high: torch.minimum(torch.maximum(value, low), high)),
    "where": (3, 3, lambda condition, *values: _kept_nan(torch.where(condition != 0, *values), condition)),
}
KNOWN = (*VARIABLES, *KNOBS, *_FUNCTIONS)


def _cuts_off(node: ast.AST) -> bool:
    """Whether a piece of a formula is flat at zero for some of what it is given, or may be."""
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
    return isinstance(node, ast.Compare) or called in ("min", "max", "clip", "where")


class _Scope:
    """The values of the names of a formula for one tile, each computed when first asked for."""

    def __init__(self, tile: Tile, knobs: dict[str, float]):
        self.tile, self.knobs, self.found = tile, knobs, {}

    def number(self, value: float) -> Tensor:
        return self.tile.label_log_probs.new_full((), value)

    def name(self, name: str) -> Tensor:
        if name not in self.found:
            read = VARIABLES[name].read(self.tile) if name in VARIABLES else self.number(self.knobs[name])
            self.found[name] = read.to(self.tile.label_log_probs.dtype)
        return self.found[name]


_Compiled = Callable[[_Scope], Tensor]


def is_formula(text: str) -> bool:
    """Whether a word is meant as a formula, and not as the name of a design."""
    # No design has a name so long that a message could not repeat it.
    return isinstance(text, str) and (not text.isidentifier() or text in VARIABLES or len(text) > MAX_LENGTH)


class Formula:
    """A formula in the statistics of a token, as a function from a tile to one number per token `[n]`.

    Attributes:
        text: the formula as it was written.
        names: the variables that it reads, of `VARIABLES`.
        knobs: the knobs that it reads, which have no default.
        has_zeros: whether it may be exactly zero for many tokens: it compares, cuts off, or reads the weights.

    Raises:
        ValueError: it is no formula; the message names the piece that is wrong and what is known.
    """

    def __init__(self, text: str, argument: str = "trust"):
        self.text, self.names, self.knobs, self._argument = text, [], [], argument
        expression = self._parsed()
        self._evaluate = self._compiled(expression, 1)
        self.has_zeros = "weight" in self.names or any(map(_cuts_off, ast.walk(expression)))
        self.__doc__ = f"{ {'trust': 'γ', 'scale': 's'}.get(argument, argument) } = {text.strip()}."
        # What `read_knobs` reads of any design.
        tile = inspect.Parameter("tile", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        knobs = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in self.knobs]
        self.__signature__ = inspect.Signature([tile, *knobs])

    def __call__(self, tile: Tile, **knobs: float) -> Tensor:
        return self._evaluate(_Scope(tile, knobs)).expand_as(tile.label_log_probs)

    def __reduce__(self):
        return Formula, (self.text, self._argument)

    @property
    def uses_prior(self) -> bool:
        """Whether it reads the prior."""
        return any(VARIABLES[name].uses_prior for name in self.names)

    @property
    def uses_token_weights(self) -> bool:
        """Whether it reads the dataset's weights."""
        return any(VARIABLES[name].uses_token_weights for name in self.names)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics of a tile that it reads."""
        return tuple(name for name in self.names if name in TILE_STATISTICS)

    def _wrong(self, reason: str) -> ValueError:
        shown = self.text if len(self.text) <= 80 else f"{self.text[:80]}..."
        return ValueError(f"`{self._argument}={shown!r}` is no formula: {reason}")

    def _parsed(self) -> ast.expr:
        if len(self.text) > MAX_LENGTH:
            raise self._wrong(f"it has {len(self.text)} characters, more than {MAX_LENGTH}. Shorten it.")
        try:
            with warnings.catch_warnings(action="ignore"):
                return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", None) or str(error) or type(error).__name__
            raise self._wrong(f"{reason}. Write it as in Python, e.g. `min(1, p / 0.1)`.") from None

    def _compiled(self, node: ast.AST, depth: int) -> _Compiled:
        if depth > MAX_DEPTH:
            raise self._wrong(f"it is nested more than {MAX_DEPTH} deep. Simplify it.")

        def part(child: ast.AST) -> _Compiled:
            return self._compiled(child, depth + 1)

        match node:
            case ast.Constant(value=bool() | complex() | str() | bytes() | None | ast.Ellipsis):
                raise self._wrong(f"`{ast.unparse(node)}` is no number.")
            case ast.Constant(value=int() | float() as value):
                return self._constant(value)
            case ast.Name(id=name):
                return self._name(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = part(operand)
                return lambda scope: -value(scope)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return part(operand)
            case ast.BinOp(op=op) if type(op) in _OPERATORS:
                return self._binary(node, part)
            case ast.Compare(ops=ops) if all(type(op) in _COMPARISONS for op in ops):
                return self._comparison(node, part)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return self._call(name, arguments, part)
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                raise self._unknown(name)
        hint = " Multiply conditions for `and`, or use `where`." if isinstance(node, ast.BoolOp | ast.IfExp) else ""
        raise self._wrong(
            f"`{_shown(node)}` is not allowed in it.{hint} A formula has numbers, the names {', '.join(VARIABLES)}, "
            f"knobs, + - * / **, comparisons, and the functions {', '.join(_FUNCTIONS)}."
        )

    def _unknown(self, name: str) -> ValueError:
        near = nearest(name, KNOWN)
        meant = f" Did you mean {near[0]}?" if near else ""
        return self._wrong(
            f"`{name}` is not known.{meant} Known are {', '.join(VARIABLES)}; the knobs {', '.join(KNOBS)}; the "
            f"functions {', '.join(_FUNCTIONS)}."
        )

    def _constant(self, value: float) -> _Compiled:
        if abs(value) > MAX_CONSTANT or not math.isfinite(value):
            raise self._wrong(f"it has a number beyond {MAX_CONSTANT:g}.")
        return lambda scope: scope.number(value)

    def _name(self, name: str) -> _Compiled:
        if name not in VARIABLES and name not in KNOBS:
            if name in _FUNCTIONS:
                raise self._wrong(f"`{name}` is a function: write `{name}(...)`.")
            raise self._unknown(name)
        known = self.names if name in VARIABLES else self.knobs
        if name not in known:
            known.append(name)
        return lambda scope: scope.name(name)

    def _binary(self, node: ast.BinOp, part: Callable[[ast.AST], _Compiled]) -> _Compiled:
        if isinstance(node.op, ast.Pow):
            exponent = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
            if not any(isinstance(part, ast.Name) for part in ast.walk(exponent)):
                number = exponent.value if isinstance(exponent, ast.Constant) else None
                if not isinstance(number, int | float) or abs(number) > MAX_EXPONENT:
                    raise self._wrong(f"`{_shown(node)}` needs a plain number up to {MAX_EXPONENT:g} as its exponent.")
            if logarithm := self._logarithm_of(node.left):
                power = part(node.right)
                return lambda scope: (power(scope) * logarithm(scope)).exp()
        if isinstance(node.op, ast.Div):
            over, under = self._logarithm_of(node.left), self._logarithm_of(node.right)
            if over and under:
                return lambda scope: (over(scope) - under(scope)).exp()
        function, left, right = _OPERATORS[type(node.op)], part(node.left), part(node.right)
        return lambda scope: function(left(scope), right(scope))

    def _logarithm_of(self, node: ast.AST) -> _Compiled | None:
        """The logarithm of `p` or `r`, which is exact where the probability itself has underflowed."""
        if isinstance(node, ast.Name) and node.id in _LOGARITHMS:
            return self._name(_LOGARITHMS[node.id])
        return None

    def _comparison(self, node: ast.Compare, part: Callable[[ast.AST], _Compiled]) -> _Compiled:
        values = [part(child) for child in (node.left, *node.comparators)]
        functions = [_COMPARISONS[type(op)] for op in node.ops]

        def compare(scope: _Scope) -> Tensor:
            found = [value(scope) for value in values]
            held = [function(*pair) for function, *pair in zip(functions, found, found[1:], strict=False)]
            return _kept_nan(reduce(operator.and_, held).to(found[0].dtype), *found)

        return compare

    def _call(self, name: str, arguments: list[ast.expr], part: Callable[[ast.AST], _Compiled]) -> _Compiled:
        fewest, most, function = _FUNCTIONS[name]
        if not fewest <= len(arguments) <= most:
            number = str(fewest) if fewest == most else f"at least {fewest}"
            raise self._wrong(f"`{name}` takes {number} argument{'s' if fewest > 1 else ''}, not {len(arguments)}.")
        if name == "log" and (logarithm := self._logarithm_of(arguments[0])):
            return logarithm
        values = [part(argument) for argument in arguments]
        return lambda scope: function(*(value(scope) for value in values))


def _shown(node: ast.AST) -> str:
    text = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
    return text if len(text) <= 40 else f"{text[:40]}..."
