"""PTX text to instructions: one kernel, its parameters, its variables and its labels.

The grammar is that of NVIDIA's PTX ISA as Triton (LLVM) and nvcc write it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    """A register, a predicate, or a special register such as `%tid.x`."""

    name: str


@dataclass(frozen=True)
class Negated:
    """`!p`: a predicate's complement."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal as its bit pattern; negative integers are kept as such."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base is a register, a variable or a parameter, or None."""

    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """`d|p`: two results."""

    first: Operand
    second: Operand


Operand = Register | Negated | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    """`@predicate name.modifiers operands`; `type` is the last modifier, as in `add.f32`."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Register | Negated | None
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1] if self.modifiers else ""


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter's place in the parameter block, in bytes."""

    name: str
    type: str
    offset: int
    size: int


@dataclass
class Program:
    """One kernel. Variables' offsets are in their own space, in bytes.

    `registers` are the names declared; `%r<9>` declares `%r`, short for `%r0` to `%r8`.
    """

    name: str
    parameters: dict[str, Parameter]
    instructions: list[Instruction]
    labels: dict[str, int]
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    constants: dict[str, bytes] = field(default_factory=dict)
    registers: set[str] = field(default_factory=set)

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters.values()), default=0)


_SIZES = {"pred": 1, "bf16": 2, "b128": 16}
_DIRECTIVE_LINE = re.compile(r"^\s*\.(?:loc|file|section|version|target|address_size)\b.*$", re.M)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)")
_VARIABLE = re.compile(
    r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"(?:\[(\d*)\])?(?:\s*=\s*\{([^}]*)\})?\s*;"
)
_LABEL = re.compile(r"\s*([\w$]+):(?!:)")
_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)$", re.S)
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]$")


def size_of(type_: str) -> int:
    """Bytes of a PTX type such as `f32`, `b64`, `bf16x2`."""
    if type_ in _SIZES:
        return _SIZES[type_]
    base, _, lanes = type_.partition("x")
    if lanes:
        return int(lanes) * size_of(base)
    digits = re.sub(r"\D", "", base)
    if not digits:
        raise NotImplementedError(f"PTX type .{type_}")
    return int(digits) // 8


def parse(ptx: str, kernel: str | None = None) -> Program:
    """Parse one kernel of a PTX module.

    Args:
        ptx: the module's text.
        kernel: the kernel's name or a part of it; the first kernel if None.

    Raises:
        ValueError: there is no such kernel.
        SyntaxError: a statement is not understood.
    """
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", ptx), flags=re.S)
    text = _DIRECTIVE_LINE.sub("", text)
    entries = list(_ENTRY.finditer(text))
    chosen = next((e for e in entries if kernel is None or kernel in e[1]), None)
    if chosen is None:
        names = ", ".join(e[1] for e in entries) or "none"
        raise ValueError(f"kernel: got {kernel!r}, the PTX has {names}")
    program = Program(chosen[1], _parameters(chosen[2]), [], {})
    body = _block(text, text.index("{", chosen.end()))
    module = re.sub(r"\.visible\s+\.entry.*", "", text[: entries[0].start()], flags=re.S)
    for variable in _VARIABLE.finditer(module + body):
        _declare(program, *variable.groups())
    declared = " ".join(re.findall(r"\.reg\s+\.\w+\s+([^;]*);", body))
    program.registers = set(re.findall(r"[A-Za-z_$%][\w$]*", declared))
    for statement in _statements(_VARIABLE.sub("", body)):
        _parse_statement(program, statement)
    return program


def _block(text: str, start: int) -> str:
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 1 : position]
    raise SyntaxError("the kernel's body is not closed")


def _statements(body: str) -> list[str]:
    """Split at `;`, dropping the braces of scopes but not those of vectors."""
    found, current, depth = [], "", 0
    for char in body:
        if char in "{}" and not current.strip():
            continue  # a scope's brace
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
        if char == ";" and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += char
        if char == ":" and depth == 0 and _LABEL.fullmatch(current):
            found.append(current.strip())
            current = ""
    if current.strip():
        raise SyntaxError(f"statement without an end: {current.strip()!r}")
    return found


def _parameters(text: str) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    offset = 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        match = re.search(r"([\w$]+)(?:\[(\d+)\])?$", declaration)
        type_ = re.search(r"\.((?:[ubsf]|bf)\d+)\b", declaration)
        if match is None or type_ is None:
            raise SyntaxError(f"parameter {declaration!r}")
        name, count = match.groups()
        alignment = size_of(type_[1])
        if count and (align := re.search(r"\.align\s+(\d+)", declaration)):
            alignment = int(align[1])
        offset = -(-offset // alignment) * alignment
        size = size_of(type_[1]) * int(count or 1)
        parameters[name] = Parameter(name, type_[1], offset, size)
        offset += size
    return parameters


def _declare(
    program: Program,
    space: str,
    align: str | None,
    type_: str,
    name: str,
    count: str | None,
    values: str | None,
) -> None:
    element = size_of(type_)
    size = element * int(1 if count is None else count or 0)
    if space in ("shared", "local"):
        alignment = int(align or element)
        total = getattr(program, f"{space}_bytes")
        offset = -(-total // alignment) * alignment
        getattr(program, space)[name] = offset
        setattr(program, f"{space}_bytes", offset + size)
    else:
        numbers = [int(value, 0) for value in values.split(",")] if values else []
        data = b"".join((n % 2 ** (8 * element)).to_bytes(element, "little") for n in numbers)
        program.constants[name] = data.ljust(size, b"\0")


def _parse_statement(program: Program, statement: str) -> None:
    if label := _LABEL.fullmatch(statement):
        program.labels[label[1]] = len(program.instructions)
        return
    if not statement or statement.startswith("."):
        return
    text = " ".join(statement.split())
    match = _STATEMENT.match(text)
    if match is None:
        raise SyntaxError(f"PTX statement {text!r}")
    negated, predicate, name, modifiers, operands = match.groups()
    guard = None if predicate is None else (Negated if negated else Register)(predicate)
    program.instructions.append(
        Instruction(
            name=name,
            modifiers=tuple(modifiers.split(".")[1:]),
            operands=tuple(_operand(item, program.registers) for item in _split(operands)),
            predicate=guard,
            text=text,
        )
    )


def _split(text: str) -> list[str]:
    """The operands between the commas that stand outside braces and brackets."""
    found, current, depth = [], "", 0
    for char in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(char, 0)
        if char == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += char
    return [*found, current.strip()] if current.strip() else found


def _operand(text: str, registers: set[str]) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(item, registers) for item in _split(text[1:-1])))
    if text.startswith("["):
        match = _ADDRESS.match(text)
        if match is None:
            raise SyntaxError(f"PTX address {text!r}")
        base = _operand(match[1], registers)
        offset = int(match[3] or "0", 0) * (-1 if match[2] == "-" else 1)
        if isinstance(base, Immediate):
            return Address(None, base.bits + offset)
        if not isinstance(base, Register | Symbol):
            raise SyntaxError(f"PTX address {text!r}")
        return Address(base, offset)
    if "|" in text:
        first, second = text.split("|")
        return Pair(_operand(first.strip(), registers), _operand(second.strip(), registers))
    if text.startswith("!"):
        return Negated(text[1:])
    if text.startswith("%") or text in registers or text == "_":
        return Register(text)
    if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
        return Immediate(int(text[2:], 16))
    if re.match(r"-?\d+\.\d*$", text):
        return Immediate(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    if re.match(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
