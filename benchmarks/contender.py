"""One contender of speed.py, in a process of its own: it builds its part, then answers each line it is told with images per second.

    python contender.py ours|stock|example|hub|timm lecture|small DROPOUT     lines: "train N", "predict N", "maps N"
    python contender.py example-compiled|hub-compiled …     the same two with XLA, which Keras leaves off on a processor
    python contender.py augment-ours|augment-keras|augment-albumentations     line: "run N"
    python contender.py feed small|lecture DROPOUT     lines: "fed N", "fixed N": epochs of real batches, or of one batch again and again
    python contender.py decode|render     line: "run N"
    python contender.py peak     line: "run N", answered in GFLOP/s

Every contender has the same dimensions: patch size, d_model, blocks, heads, width of the feed-forward network, dropout, batch.
The peers keep their own stem (one strided convolution or one dense layer).
"""
import os
import sys
import time
import types

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import numpy as np

BATCH = 32
SIZE = 128
JIT = "auto"  # of the Keras peers


def batch():
    "Images of noise: nobody's speed depends on what they show."
    return np.random.default_rng(0).random((BATCH, SIZE, SIZE, 1), "float32")


def keras_tasks(model, images, targets, reader=None):
    "What a compiled Keras model can be told to do."
    tasks = {"train": lambda: model.train_on_batch(images, targets), "predict": lambda: model.predict_on_batch(images)}
    return tasks if reader is None else tasks | {"maps": lambda: reader.predict_on_batch(images)}


def ours(config):
    "brain_vit, compiled as it compiles itself for a training of a thousand steps."
    from brain_vit.training import TrainConfig, compile_vit
    from brain_vit.vit import attention_readout, build_vit
    model = compile_vit(build_vit(config), TrainConfig(), total_steps=1000)
    targets = {"tumor": np.zeros((BATCH, 1), "float32"), "lesion": np.zeros((BATCH, config.num_patches * config.splits**2), "float32")}
    return keras_tasks(model, batch(), {name: targets[name] for name in model.output}, attention_readout(model))


def stock(config):
    "brain_vit with Keras' own dropout."
    import keras

    from brain_vit.encoder import QuickDropout
    QuickDropout.call = keras.layers.Dropout.call
    return ours(config)


def compiled(tokens, image):
    "Mean pooling, one logit and the same optimizer for both Keras peers, compiled by Keras' defaults unless told otherwise."
    import keras
    logit = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(tokens))
    model = keras.Model(image, logit)
    model.compile(keras.optimizers.AdamW(5e-4, weight_decay=0.05, global_clipnorm=1.0), keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=JIT)
    return keras_tasks(model, batch(), np.zeros((BATCH, 1), "float32"))


def example(config):
    "The architecture of Keras' well-known ViT example: cut patches, dense projection, learned positions, stock layers."
    import keras
    from keras import layers, ops
    side, width = config.patch_size, config.d_model
    image = keras.Input((SIZE, SIZE, 1))
    x = layers.Lambda(lambda pixels: ops.reshape(ops.image.extract_patches(pixels, side), (-1, config.num_patches, side * side)))(image)
    x = layers.Dense(width)(x)
    x = x + layers.Embedding(config.num_patches, width)(ops.arange(config.num_patches))
    for _ in range(config.num_blocks):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.MultiHeadAttention(config.num_heads, width // config.num_heads, dropout=config.dropout)(y, y)
        x = layers.Add()([y, x])
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        for units in (int(width * config.mlp_ratio), width):
            y = layers.Dropout(config.dropout)(layers.Dense(units, activation="gelu")(y))
        x = layers.Add()([y, x])
    return compiled(layers.LayerNormalization(epsilon=1e-6)(x), image)


def hub(config):
    "KerasHub's ViT backbone."
    import keras
    import keras_hub
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(SIZE, SIZE, 1), patch_size=(config.patch_size, config.patch_size), num_layers=config.num_blocks, num_heads=config.num_heads,
        hidden_dim=config.d_model, mlp_dim=int(config.d_model * config.mlp_ratio), dropout_rate=config.dropout, use_class_token=False)
    image = keras.Input((SIZE, SIZE, 1))
    return compiled(backbone(image), image)


def timm(config):
    "timm's VisionTransformer in PyTorch."
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("unused")  # fails where torch and torchvision are of different builds
    import torch
    from timm.models.vision_transformer import VisionTransformer
    torch.set_num_threads(os.cpu_count())
    model = VisionTransformer(img_size=SIZE, patch_size=config.patch_size, in_chans=1, num_classes=1, embed_dim=config.d_model, depth=config.num_blocks,
                              num_heads=config.num_heads, mlp_ratio=config.mlp_ratio, global_pool="avg", class_token=False, proj_drop_rate=config.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=0.05)
    images, labels = torch.from_numpy(batch().transpose(0, 3, 1, 2).copy()), torch.zeros(BATCH, 1)

    def train():
        model.train()
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def predict():
        model.eval()
        with torch.inference_mode():
            model(images)

    return {"train": train, "predict": predict}


def augment_ours():
    "Our augmentation, every image with a draw of its own."
    from brain_vit.augment import augment_batch
    images = batch()
    return {"run": lambda: augment_batch(images, np.arange(BATCH))}


def augment_keras():
    "Keras' random layers for the same changes: flip, rotation, zoom, shift, contrast, brightness, gamma has none, blur, noise."
    import keras
    layers = keras.layers
    chain = keras.Sequential([
        layers.RandomFlip("horizontal"), layers.RandomRotation(15 / 360, fill_mode="constant"), layers.RandomZoom((-0.05, 0.15), fill_mode="constant"),
        layers.RandomTranslation(0.04, 0.04, fill_mode="constant"), layers.RandomCrop(122, 122), layers.Resizing(SIZE, SIZE),
        layers.RandomContrast(0.2, value_range=(0, 1)), layers.RandomBrightness(0.1, value_range=(0, 1)),
        layers.RandomGaussianBlur(kernel_size=3, sigma=0.6, value_range=(0, 1)), layers.GaussianNoise(0.015)])
    images = batch()
    if keras.backend.backend() == "tensorflow":
        import tensorflow
        graph = tensorflow.function(lambda x: chain(x, training=True))
        return {"run": lambda: graph(images).numpy()}
    return {"run": lambda: np.asarray(chain(images, training=True))}


def augment_albumentations():
    "albumentations for the same changes, with uint8-free float images as ours."
    import albumentations as A
    chain = A.Compose([
        A.HorizontalFlip(p=0.5), A.Affine(scale=(0.85, 1.05), rotate=(-15, 15), translate_percent=(-0.04, 0.04), p=1), A.RandomResizedCrop((SIZE, SIZE), scale=(0.81, 1.0), ratio=(1, 1), p=1),
        A.RandomGamma((70, 140), p=1), A.RandomBrightnessContrast(0.1, 0.2, p=1), A.GaussianBlur(blur_limit=(3, 3), sigma_limit=(0.01, 0.6), p=1), A.GaussNoise(std_range=(0.0, 0.03), p=1)])
    images = batch()
    return {"run": lambda: [chain(image=image)["image"] for image in images]}


class Fixed:
    "The same batch again and again: no input is made at all."

    def __init__(self, batches):
        self.first, self.length = batches[0], len(batches)

    def dataset(self):
        import keras

        class Repeated(keras.utils.PyDataset):
            def __len__(_):
                return self.length

            def __getitem__(_, index):
                return self.first

        return Repeated()


def feed(config):
    "`model.fit` on augmented batches with lesion targets, and on one ready batch: the difference is waiting for input."
    from brain_vit.augment import augment_batch
    from brain_vit.training import SliceBatches, TrainConfig, compile_vit
    from brain_vit.vit import build_vit
    model = compile_vit(build_vit(config), TrainConfig(), total_steps=1000)
    images = np.random.default_rng(0).random((8 * BATCH, SIZE, SIZE, 1), "float32")
    masks = images[..., 0] > 0.99
    real = SliceBatches(images, np.zeros(len(images), int), masks, config.square_size, BATCH, augment_batch)
    fixed = Fixed(real).dataset()
    return {"fed": lambda: model.fit(real, verbose=0), "fixed": lambda: model.fit(fixed, verbose=0)}


def decode():
    "Read 32 JPEG files of 512 pixels and preprocess them, on all cores."
    import tempfile

    import cv2
    from brain_vit.data import load_folder
    from brain_vit.phantom import Phantom, phantom_dataset
    from brain_vit.preprocess import preprocess_all
    folder = tempfile.TemporaryDirectory()
    for index, image in enumerate(phantom_dataset(BATCH, recipe=Phantom.easy(image_size=512)).images):
        os.makedirs(f"{folder.name}/{'yes' if index % 2 else 'no'}", exist_ok=True)
        cv2.imwrite(f"{folder.name}/{'yes' if index % 2 else 'no'}/{index}.jpg", image)
    files = load_folder(folder.name)
    return {"run": lambda: (preprocess_all(files, SIZE), folder)}


def render():
    "Full phantoms on one core."
    import cv2
    from brain_vit.phantom import Phantom
    cv2.setNumThreads(1)
    recipe, numbers = Phantom.full(), iter(range(10**9))
    return {"run": lambda: [recipe.render(0, next(numbers)) for _ in range(BATCH)]}


def peak():
    "Multiply-adds of a large float32 matrix product, GFLOP/s instead of images/s."
    matrix = np.random.default_rng(0).random((2048, 2048), "float32")
    return {"run": lambda: matrix @ matrix}


def configured(preset, dropout):
    from dataclasses import replace

    from brain_vit.vit import PRESETS
    return replace(PRESETS[preset], dropout=float(dropout))


def main(name, *arguments):
    global JIT
    if name.endswith("-compiled"):
        name, JIT = name.removesuffix("-compiled"), True
    make = globals()[name.replace("-", "_")]
    tasks = make(configured(*arguments)) if arguments else make()
    amount = {"peak": 2 * 2048**3 / 1e9, "feed": 8 * BATCH}.get(name, BATCH)
    for task in tasks.values():
        task()  # compiles
    print("ready", flush=True)
    for line in sys.stdin:
        task, count = line.split()
        start = time.perf_counter()
        for _ in range(int(count)):
            tasks[task]()
        print(amount * int(count) / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
