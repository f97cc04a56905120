"""An ONNX model whose weights are int8, made to multiply as int8 too.

As it is packaged, such a model widens its weights and multiplies as float32, because a quantised
input would usually share one scale over the whole batch: then a text's vector would depend on what
is embedded beside it. Here every row, one token of one text, has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from memos_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    import onnx

# Inputs are rounded to -127..127 and kept as 1..255: of all pairings, CPUs multiply unsigned by
# signed the fastest.
_MIDDLE = "memos_middle"
_LARGEST = "memos_largest"
_ONE = "memos_one"
_TINIEST = "memos_tiniest"


class _Product(NamedTuple):
    """A product with widened weights: `node` = input x (`weights` x `scales`)."""

    node: onnx.NodeProto
    weights: str
    scales: str


def multiply_as_int8(source: Path, target: Path) -> None:
    """Write `source` to `target` with every product with int8 weights computed in int8.

    Raises:
        ConfigurationError: the onnx package is missing, or the model has no such products.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConfigurationError(
            "preparing an embedder needs the onnx package: pip install onnx"
        ) from error
    model = onnx.load(str(source))
    graph = model.graph
    products = {product.node.output[0]: product for product in _products(graph)}
    if not products:
        raise ConfigurationError(f"{source.name} holds no products with int8 weights")
    nodes: list[onnx.NodeProto] = []
    rounded: set[str] = set()
    for node in graph.node:
        product = products.get(node.output[0])
        if product is None:
            nodes.append(node)
            continue
        if node.input[0] not in rounded:
            rounded.add(node.input[0])
            nodes += _rounding(node.input[0])
        nodes += _product(product)
    _set(graph.node, nodes)
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name)
        for name, value in (
            (_MIDDLE, np.array(128, np.uint8)),
            (_LARGEST, np.array(127, np.float32)),
            (_ONE, np.array(1, np.float32)),
            # Of a row of zeros only; what it is divided by is not to be 0.
            (_TINIEST, np.array(1e-12, np.float32)),
        )
    )
    _drop_unused(graph)
    onnx.save(model, str(target))


def _products(graph: onnx.GraphProto) -> Iterator[_Product]:
    made_by: dict[str, onnx.NodeProto] = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        widened = made_by.get(node.input[1])
        if widened is None or widened.op_type != "Mul" or widened.input[1] not in stored:
            continue
        cast = made_by.get(widened.input[0])
        if cast is not None and cast.op_type == "Cast" and cast.input[0] in stored:
            yield _Product(node, cast.input[0], widened.input[1])


def _rounding(name: str) -> list[onnx.NodeProto]:
    """Nodes that make of an input [.., k] its int8 and, for each row, the scale [.., 1] of it."""
    return [
        _node("Abs", [name], f"{name}_abs"),
        _node("ReduceMax", [f"{name}_abs"], f"{name}_max", axes=[-1], keepdims=1),
        _node("Max", [f"{name}_max", _TINIEST], f"{name}_reach"),
        _node("Div", [f"{name}_reach", _LARGEST], f"{name}_scale"),
        _node("Div", [name, f"{name}_scale"], f"{name}_steps"),
        _node("QuantizeLinear", [f"{name}_steps", _ONE, _MIDDLE], f"{name}_int8"),
    ]


def _product(product: _Product) -> list[onnx.NodeProto]:
    name, made = product.node.input[0], product.node.output[0]
    return [
        _node("MatMulInteger", [f"{name}_int8", product.weights, _MIDDLE], f"{made}_sum"),
        _node("Cast", [f"{made}_sum"], f"{made}_float", to=1),
        _node("Mul", [f"{made}_float", f"{name}_scale"], f"{made}_scaled"),
        _node("Mul", [f"{made}_scaled", product.scales], made),
    ]


def _node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    import onnx

    return onnx.helper.make_node(kind, inputs, [output], **attributes)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            kept.append(node)
            used.update(node.input)
    _set(graph.node, kept[::-1])
    _set(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])


def _set(field: Any, values: list[Any]) -> None:
    del field[:]
    field.extend(values)
