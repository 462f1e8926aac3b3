"""Published sets of pictures, which `python -m ldm.tools.prepare` brings from the form they are published in."""

from ldm.data.images import ImageFolder


class Emoji(ImageFolder):
    """Noto's colour emoji (Apache-2.0), each with its Unicode name as caption."""

    origin = (
        "`npm pack emoji-datasource-google` (64 pixels) or github.com/googlefonts/noto-emoji (128 pixels) has the "
        "pictures, and `python -m ldm.tools.prepare emoji FILE` prepares them"
    )


class Cifar10(ImageFolder):
    """CIFAR-10 (Krizhevsky, 2009): photographs of ten classes, 32 x 32."""

    origin = (
        "www.cs.toronto.edu/~kriz/cifar.html has cifar-10-python.tar.gz and cifar-10-binary.tar.gz, "
        "and `python -m ldm.tools.prepare cifar10 FILE` prepares either"
    )
