"""An ONNX file with smaller numbers: weights in float16, or convolutions in int8."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

SMALL = 64  # numbers; below, a cast costs more than it saves


def to_float16(source: Path, target: Path) -> None:
    """Write the weights as float16; the engine turns them to float32 once, when it loads them, and computes in that.

    Raises:
        ValueError: A weight is too large for float16.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    casts = []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if weight.data_type != TensorProto.FLOAT or values.size < SMALL:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(
                f"{source.name}: {weight.name} has weights up to {np.abs(values).max():.3g}, float16 ends at 65504; "
                f"export it with --precision float32."
            )
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, f"{name}_float16"))
        casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)
    onnx.checker.check_model(model)
    onnx.save(model, target)


def to_int8(source: Path, target: Path, patches: Iterable[np.ndarray]) -> None:
    """Write all convolutions but the first and the last with int8 weights and activations, scaled per channel.

    Args:
        source: An ONNX file in float32.
        target: The file to write.
        patches: (1, channels, *patch), float32: what activations are as large as.

    Raises:
        ValueError: There is no convolution to turn to int8, or ONNX Runtime cannot do it.
    """
    import onnx
    from onnxruntime import quantization

    class Patches(quantization.CalibrationDataReader):
        left = iter(patches)

        def get_next(self) -> dict | None:
            patch = next(self.left, None)
            return None if patch is None else {"image": patch}

    convolutions = [node.name for node in onnx.load(source).graph.node if node.op_type == "Conv"]
    if len(convolutions) < 3:
        raise ValueError(
            f"{source.name} has {len(convolutions)} convolutions, and the first and the last stay in float32: nothing "
            f"is left for int8. Export it with --precision float32."
        )
    log = logging.getLogger()
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it advises to optimise the file first, which the engines do themselves
        with contextlib.redirect_stdout(io.StringIO()):
            quantization.quantize_static(
                source,
                target,
                Patches(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_exclude=[convolutions[0], convolutions[-1]],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                # 8 bits of both overflow in 16 on processors without VNNI.
                reduce_range=False,
            )
    except OSError:  # of a file, not of the network
        raise
    except Exception as error:  # ONNX Runtime's own, for operators and shapes that it cannot turn
        raise ValueError(
            f"{source.name} cannot be turned to int8: {type(error).__name__}: {str(error)[:300]}. Export it with "
            f"--precision float32 or float16."
        ) from error
    finally:
        log.setLevel(level)
