"""A network of the user's own: built, trained, saved with its code, loaded, exported."""

import dataclasses
import importlib.util
import shutil

import keras
import numpy as np
import pytest
import test_serve

import export
import metrics
import model
import predict
import train
import utils
from exporting import onnx_export
from imaging import formats
from inference import engines, segment
from networks import own
from training import checks
from utils import UserError

# Layers of Keras only, and logits at the end.
PLAIN = """
from keras import Input, Model, layers

def build(input_shape, outputs):
    inputs = Input(input_shape)
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    return Model(inputs, layers.Conv2D(outputs, 1)(x))
"""
# A layer of one's own that cannot be configured, an operation, and volumes, too.
LAYERED = """
from dataclasses import dataclass

from keras import Input, Model, layers, ops

@dataclass
class Size:
    filters: int

class Scale(layers.Layer):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * self.factor

def build(input_shape, outputs):
    inputs = Input(input_shape)
    conv = layers.Conv2D if len(input_shape) == 3 else layers.Conv3D
    x = conv(4, 3, padding="same")(inputs)
    x = Scale(Size(4))(ops.gelu(x, approximate=False)) + 1
    return Model(inputs, conv(outputs, 1)(layers.BatchNormalization()(x)))
"""
HEAD = "from keras import Input, Model, Sequential, layers\n"
needs_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow exports"
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file of code, to which the current folder is changed."""
    monkeypatch.chdir(tmp_path)

    def write_code(code, name="my_net.py"):
        (tmp_path / name).write_text(code)
        return f"{name}:build"

    return write_code


def save(network, path, architecture, **more):
    facts = utils.make_metadata(["x"], (16, 16), 1, architecture=architecture, **more)
    utils.save_model(network, path, facts)


@pytest.mark.parametrize(("outputs", "overlap", "ending"), [(1, 0, 1), (3, 0, 0), (3, 1, 1)])
def test_logits_become_probabilities(write, outputs, overlap, ending):
    network = model.build_unet(
        (16, 16, 2), outputs, architecture=write(PLAIN), overlap=bool(overlap)
    )
    x = np.random.default_rng(0).random((2, 16, 16, 2), np.float32)
    logits = keras.Model(network.input, network.layers[-2].output)(x)
    expected = keras.ops.sigmoid(logits) if ending else keras.ops.softmax(logits)
    np.testing.assert_allclose(network(x), expected, atol=1e-6)
    assert network.layers[-1].name == "probabilities"


@pytest.mark.parametrize(
    "end",
    [
        'layers.Conv2D(outputs, 1, activation="softmax")(x)',
        "layers.Softmax()(layers.Conv2D(outputs, 1)(x))",
        'layers.UpSampling2D(2)(layers.Conv2D(outputs, 1, 2, activation="softmax")(x))',
        'Sequential([layers.Conv2D(outputs, 1), layers.Activation("softmax")])(x)',
        "ops.softmax(layers.Conv2D(outputs, 1)(x))",
    ],
)
def test_probabilities_are_left_as_they_are(write, end):
    code = (
        f"{HEAD}from keras import ops\ndef build(input_shape, outputs):\n    x = Input(input_shape)"
    )
    network = model.build_unet(
        (8, 8, 1), 3, architecture=write(f"{code}\n    return Model(x, {end})")
    )
    x = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    np.testing.assert_allclose(keras.ops.sum(network(x), axis=-1), 1, atol=1e-5)
    ending = keras.Model(network.input, network.layers[-1].input)
    np.testing.assert_allclose(network(x), ending(x), atol=1e-6)


def test_the_output_is_float32_in_mixed_precision(write):
    utils.set_precision("bfloat16")
    network = model.build_unet((8, 8, 1), architecture=write(PLAIN))
    assert network.output.dtype == "float32" and network.layers[1].compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = (", "my_net.py, line 1: SyntaxError"),
        ("import keras\nimport no_such_package", "line 2: ModuleNotFoundError: .*; install the"),
        ("def other(): pass", "my_net.py has no function build"),
        ("def build(shape): pass", "my_net.py: TypeError: build.. takes 1 positional"),
        ("def build(shape, outputs):\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("def build(shape, outputs):\n    return 5", "returned int; expected a keras.Model"),
        (
            f"{HEAD}def build(s, n):\n    return Sequential([layers.Conv2D(n, 3)])",
            "returned a model without inputs",
        ),
        (
            f"{HEAD}def build(s, n):\n    return Sequential([Input(s), layers.Conv2D(n, 3)])",
            r"a model of output \(None, 6, 6, 2\); expected \(None, 8, 8, 2\)",
        ),
        (
            f"{HEAD}def build(s, n):\n"
            "    return Sequential([Input((8, 8, 9)), layers.Conv2D(n, 1)])",
            r"a model of input \(None, 8, 8, 9\); expected \(None, 8, 8, 1\)",
        ),
        (
            f"{HEAD}def build(s, n):\n    x = Input(s)\n    return Model(x, [x, x])",
            r"a model of output \(None, 8, 8, 1\), \(None, 8, 8, 1\); expected",
        ),
        (
            f"{HEAD}def build(s, n):\n"
            "    return Sequential([Input(s), layers.Conv2D(n, 1, activation='sigmoid')])",
            "ends in sigmoid; expected softmax, or no activation",
        ),
    ],
)
def test_what_does_not_fit_is_told(write, code, message):
    with pytest.raises(UserError, match=message):
        model.build_unet((8, 8, 1), 2, architecture=write(code))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("my_net.py:", "expected file.py:function or package.module:function"),
        (":build", "expected file.py:function"),
        ("nowhere.py:build", "nowhere.py is not a file"),
        ("no_such_package.nets:build", "Python finds no module no_such_package.nets"),
        ("json.nothing:build", "Python finds no module json.nothing"),
    ],
)
def test_code_that_is_missing_is_told_before_keras_is_loaded(architecture, message):
    with pytest.raises(UserError, match=message):
        checks.check_architecture(architecture, [])


def test_code_is_found_without_running_it(write):
    write("raise SystemExit")
    checks.check_architecture("my_net.py:build", ["unet"])
    assert own.find_code("json.decoder:JSONDecoder").name == "decoder.py"
    assert own.find_code("xml.etree.ElementTree:parse").parent.name == "etree"


def test_a_network_of_keras_layers_needs_no_code_to_be_loaded(write, tmp_path):
    architecture = write(PLAIN)
    network = model.build_unet((16, 16, 1), architecture=architecture)
    save(network, tmp_path / "run" / "model.h5", architecture)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.h5"]
    (tmp_path / "my_net.py").unlink()
    loaded = keras.models.load_model(tmp_path / "run" / "model.h5", compile=False)
    x = np.random.default_rng(0).random((2, 16, 16, 1), np.float32)
    np.testing.assert_allclose(loaded(x), network(x), atol=1e-6)
    assert "architecture" not in utils.load_metadata(tmp_path / "run" / "model.h5")


@pytest.mark.parametrize("shape", [(16, 16, 1), (4, 16, 16, 1)])
def test_a_network_with_layers_of_its_own_takes_its_code_along(write, tmp_path, shape):
    """The code is that which was run; without it, or with other code, the model is refused."""
    network = model.build_unet(shape, 3, architecture=write(LAYERED))
    for layer in network.layers:
        layer.set_weights([weight + 0.1 for weight in layer.get_weights()])
    write("edited since")
    path = tmp_path / "run" / "model.h5"
    save(network, path, "my_net.py:build")
    (tmp_path / "my_net.py").unlink()
    moved = shutil.copytree(path.parent, tmp_path / "elsewhere") / "model.h5"
    loaded, facts = utils.load_model(moved)
    x = np.random.default_rng(0).random((2, *shape), np.float32)
    np.testing.assert_allclose(loaded(x), network(x), atol=1e-6)
    assert facts["architecture"] == "model_network.py:build" and facts["classes"] == ["x"]

    code = moved.with_name("model_network.py")
    code.write_text(LAYERED.replace("conv(4", "conv(5"))
    with pytest.raises(UserError, match="its weights do not fit the network that model_network.py"):
        utils.load_model(moved)
    code.unlink()
    with pytest.raises(UserError, match=r"needs the code of its network. .*model_network.py is no"):
        utils.load_model(moved)


def test_classes_that_overlap_do_so_after_loading(write, tmp_path):
    network = model.build_unet((16, 16, 1), 3, architecture=write(LAYERED), overlap=True)
    path = tmp_path / "model.h5"
    save(network, path, "my_net.py:build", masks={"overlap": True})
    x = np.random.default_rng(0).random((2, 16, 16, 1), np.float32)
    np.testing.assert_allclose(utils.load_model(path)[0](x), network(x), atol=1e-6)


def test_a_network_with_code_is_saved_again_from_any_folder(write, tmp_path, monkeypatch):
    network = model.build_unet((16, 16, 1), architecture=write(LAYERED))
    save(network, tmp_path / "run" / "model.h5", "my_net.py:build")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded, facts = utils.load_model(tmp_path / "run" / "model.h5")
    utils.save_model(loaded, tmp_path / "new" / "adapted.h5", facts, tmp_path / "run")
    assert (tmp_path / "new" / "adapted_network.py").read_text() == LAYERED
    assert utils.load_model(tmp_path / "new" / "adapted.h5")[0].count_params()


def test_code_is_never_taken_from_another_folder(write, tmp_path):
    network = model.build_unet((16, 16, 1), architecture=write(LAYERED))
    save(network, tmp_path / "run" / "model.h5", "my_net.py:build")
    (tmp_path / "run" / "model_network.py").unlink()
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    utils.update_metadata(tmp_path / "run" / "model.h5", architecture="../evil.py:build")
    with pytest.raises(UserError, match=r"run/evil.py is not a file"):
        utils.load_model(tmp_path / "run" / "model.h5")


def test_a_network_of_a_package_is_loaded_from_there(write, tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    write(LAYERED, "my_package/nets.py")
    monkeypatch.syspath_prepend(tmp_path)
    architecture = "my_package.nets:build"
    network = model.build_unet((16, 16, 1), architecture=architecture)
    save(network, tmp_path / "run" / "model.h5", architecture)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.h5"]
    x = np.random.default_rng(0).random((2, 16, 16, 1), np.float32)
    loaded, _ = utils.load_model(tmp_path / "run" / "model.h5")
    np.testing.assert_allclose(loaded(x), network(x), atol=1e-6)
    monkeypatch.undo()
    with pytest.raises(UserError, match="needs the code of its network.* no module my_pack"):
        utils.load_model(tmp_path / "run" / "model.h5")


def config_for(discs, tmp_path, architecture, **more):
    return train.Config(
        data_dir=str(discs),
        image_size=20,  # no multiple of 2**depth: the network decides
        epochs=2,
        batch_size=4,
        epoch_images=0,
        out_dir=str(tmp_path / "run"),
        architecture=architecture,
        **more,
    )


def test_it_trains_resumes_and_starts_anew_when_its_code_changes(discs, tmp_path, write, capsys):
    config = config_for(discs, tmp_path, write(LAYERED))
    assert len(train.train(config)) == 2
    network, facts = utils.load_model(tmp_path / "run" / "model.h5")
    assert facts["architecture"] == "model_network.py:build"
    assert len(train.train(dataclasses.replace(config, epochs=3))) == 3
    capsys.readouterr()
    write(LAYERED.replace("+ 1", "+ 2"))
    assert len(train.train(dataclasses.replace(config, epochs=3))) == 3
    assert "my_net.py changed; a new run starts, the old one is kept" in capsys.readouterr().out
    old, _ = utils.load_model(tmp_path / "run" / "previous1" / "model.h5")
    assert "+ 1" in (tmp_path / "run" / "previous1" / "model_network.py").read_text()
    assert "+ 2" in (tmp_path / "run" / "model_network.py").read_text()
    assert len(old.get_weights()) == len(network.get_weights())


@needs_tensorflow
@pytest.mark.parametrize("shape", [(16, 16, 1), (4, 16, 16, 1)])
def test_it_is_exported_to_onnx(write, tmp_path, shape):
    network = model.build_unet(shape, architecture=write(LAYERED))
    network(np.zeros((1, *shape), np.float32))
    onnx_export.write_onnx(network, {}, tmp_path / "net.onnx")
    session = engines.open_onnxruntime((tmp_path / "net.onnx").read_bytes())
    x = np.random.default_rng(0).random((2, *shape), np.float32)
    np.testing.assert_allclose(session.predict_on_batch(x), network(x), atol=1e-5)


@needs_tensorflow
@pytest.mark.parametrize(
    "step",
    [
        # Keras compiles grouped convolutions by XLA.
        "layers.Conv2D(4, 3, padding='same', groups=2)(layers.Conv2D(4, 1)(x))",
        # tf2onnx joins the reshapes of attention with one head.
        "layers.Reshape((16, 16, 4))(attend(layers.Reshape((256, 4))(layers.Conv2D(4, 1)(x))))",
    ],
)
def test_grouped_convolutions_and_attention_are_exported(write, tmp_path, step):
    code = f"""{HEAD}from keras import ops
def attend(x):
    heads = ops.transpose(ops.reshape(layers.Dense(4)(x), (-1, 256, 1, 4)), (0, 2, 1, 3))
    mixed = ops.softmax(heads @ ops.transpose(heads, (0, 1, 3, 2))) @ heads
    return ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, 256, 4))

def build(s, n):
    x = Input(s)
    return Model(x, layers.Conv2D(n, 1)({step}))
"""
    network = model.build_unet((16, 16, 1), architecture=write(code))
    onnx_export.write_onnx(network, {}, tmp_path / "net.onnx")  # compares a batch with Keras


# TensorFlow's Erfinv is unknown to ONNX; NumPy is unknown to TensorFlow's graphs.
@needs_tensorflow
@pytest.mark.parametrize(
    ("step", "message", "kept"),
    [
        ("ops.erfinv(x / 2)", "ONNX has no operation for TensorFlow's Erfinv. What rem", True),
        ("Stop()(x)", "cannot be exported: TensorFlow makes no graph of it .*NotImpl", False),
    ],
)
def test_what_cannot_be_exported_is_told(discs, write, tmp_path, step, message, kept):
    code = f"""{HEAD}import numpy as np
from keras import ops

class Stop(layers.Layer):
    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        return np.asarray(x) + 0 * x

def build(s, n):
    x = Input(s)
    return Model(x, layers.Conv2D(n, 1)({step}))
"""
    network = model.build_unet((16, 16, 1), architecture=write(code))
    path, out = tmp_path / "run" / "model.h5", tmp_path / "export"
    save(network, path, "my_net.py:build")
    config = export.Config(str(path), str(out), images=str(discs / "images"), checked=2)
    with pytest.raises(UserError, match=message):
        export.export(config)
    assert (out / "saved_model").is_dir() == kept and not (out / "manifest.json").exists()


# Two of medicai's (PyPI, Apache-2.0). Their layers are not registered with Keras.
SEGFORMER = """
from medicai.models import SegFormer

def build(input_shape, outputs):
    return SegFormer(encoder_name="mit_b0", input_shape=input_shape, num_classes=outputs)
"""
SWIN_UNETR = """
from medicai.models import SwinBackbone, SwinUNETR

def build(input_shape, outputs):
    encoder = SwinBackbone(
        input_shape=input_shape, embed_dim=12, window_size=4, patch_size=2, depths=(2, 1, 1, 1),
        num_heads=(3, 3, 6, 6), downsampling_strategy="swin_unetr_like",
    )
    return SwinUNETR(encoder=encoder, num_classes=outputs, feature_size=12)
"""
needs_medicai = pytest.mark.skipif(
    importlib.util.find_spec("medicai") is None,
    reason="medicai is not installed: pip install -r requirements-dev.txt",
)


@pytest.mark.slow
@needs_medicai
@pytest.mark.parametrize("shape", [(64, 64, 1), (32, 32, 32, 1)])
def test_a_segformer_of_medicai_is_trained_and_saved(write, tmp_path, shape):
    network = model.build_unet(shape, 2, architecture=write(SEGFORMER))
    network.compile("adam", metrics.bce_dice_loss, run_eagerly=True)
    x = np.random.default_rng(0).random((1, *shape), np.float32)
    assert np.isfinite(network.train_on_batch(x, np.concatenate([x > 0.5, x <= 0.5], -1)))
    save(network, tmp_path / "run" / "model.h5", "my_net.py:build")
    loaded, _ = utils.load_model(tmp_path / "run" / "model.h5")
    np.testing.assert_allclose(loaded(x), network(x), atol=1e-5)


@pytest.mark.slow
@needs_medicai
@needs_tensorflow
def test_a_segformer_of_medicai_is_trained_exported_and_served(discs, write, tmp_path, monkeypatch):
    """Its probabilities and masks are those of Keras, without medicai."""
    compile_as_usual = keras.Model.compile

    def compile_eagerly(network, *args, **flags):
        compile_as_usual(network, *args, **flags | {"run_eagerly": True, "jit_compile": False})

    monkeypatch.setattr(keras.Model, "compile", compile_eagerly)  # a graph takes a minute
    config = config_for(discs, tmp_path, write(SEGFORMER), precision="float32")
    train.train(dataclasses.replace(config, image_size=32, epochs=1))
    path, onnx_file = tmp_path / "run" / "model.h5", tmp_path / "export" / "unet.onnx"
    image = discs / "images" / "disc00.png"

    def segment_with(model_file):
        members = predict.load_members(predict.Config(str(model_file), precision="float32"))
        kept = segment.Options(probabilities=True)
        return segment.segment_scans(members, [formats.read_scan(image)], kept)[0]

    by_keras = segment_with(path)
    middle = float(np.median(by_keras.probs))
    expected = by_keras.probs[0][..., 0] >= middle
    utils.update_metadata(path, threshold=middle)  # so that half of the mask is foreground
    out_dir = str(onnx_file.parent)
    export.export(export.Config(str(path), out_dir, images=str(discs / "images"), checked=1))
    by_onnx = segment_with(onnx_file)
    np.testing.assert_allclose(by_onnx.probs, by_keras.probs, atol=1e-4)
    assert ((by_onnx.ids[0] > 0) == expected).mean() > 0.999 and 0.4 < expected.mean() < 0.6

    (tmp_path / "service").mkdir()
    service = test_serve.Running(onnx_file.parent, tmp_path / "service")
    try:
        answer = service.client.post("/v1/segment", content=image.read_bytes())
    finally:
        service.stop()
    mask = formats.decode_image(answer.content)[..., 0] > 0
    assert (mask == expected).mean() > 0.999


@pytest.mark.slow
@needs_medicai
@needs_tensorflow
def test_a_swin_unetr_of_medicai_is_exported_to_onnx(write, tmp_path):
    network = model.build_unet((32, 32, 1), 3, architecture=write(SWIN_UNETR))
    onnx_export.write_onnx(network, {}, tmp_path / "net.onnx")
    session = engines.open_onnxruntime((tmp_path / "net.onnx").read_bytes())
    x = np.random.default_rng(0).random((3, 32, 32, 1), np.float32)
    np.testing.assert_allclose(session.predict_on_batch(x), network(x), atol=1e-4)
