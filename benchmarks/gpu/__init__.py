"""What there is to measure on a GPU, in one command, for whoever has one for a quarter of an hour.

    python -m benchmarks.gpu --minutes 13 --out DIR [--data FOLDER] [--scale 0.001]

It runs, in this order, and writes each result as soon as it exists:

1. ``sanity.csv``: the tests marked ``gpu``, two minutes at most;
2. ``steps.csv``: the time of a step in float and quantised, by precision, eager, as a CUDA graph and compiled, beside
   those of Brevitas and torchao where these are installed, and with a teacher live and cached;
3. ``ways.csv``: steps a second of 1 to 12 trainings at once, on streams of one process and in several processes;
4. ``accuracy.csv``: ResNet-20 on CIFAR-10, then CIFAR-100, 200 epochs each, in the order of :func:`plan.runs`.

A stage that fails or takes too long is recorded in ``stages.json`` and does not stop the next one; its output is in
``STAGE.log``. The same command with the same folder goes on where it was: tests that passed, rows that are there and
trainings that are finished are not done again, what failed is tried again, and trainings that were cut go on from
``states``.

**What to bring**, for a machine without a network:

* this repository;
* a folder, ``--data`` or ``$LQKD_DATA``, with ``cifar10.tar.gz`` and ``cifar100.tar.gz``: each unpacks to
  ``train/CLASS`` and ``test/CLASS`` with images, or to torchvision's ``cifar-10-batches-py`` and ``cifar-100-python``.
  Where little can be carried at a time they come in pieces, ``split -b 50m cifar10.tar.gz cifar10.tar.gz.``, which are
  joined here in the order of their names. Unpacked folders ``cifar10`` and ``cifar100`` do as well. Without CIFAR-100
  its trainings alone are left out;
* in that folder ``weights/cifar10_resnet20.safetensors`` and ``cifar10_resnet56.safetensors``, 1 and 3.5 MB: the float
  weights of akamaster/pytorch_resnet_cifar10. CIFAR-100's float network is trained here;
* packages that the machine lacks, as wheels. torch and torchvision must be there. lqkd needs lightning, torchmetrics,
  jsonargparse (with docstring-parser and typeshed-client), safetensors, scikit-learn, matplotlib and rich, with what
  they need; the sanity stage needs pytest; the contest of steps has brevitas (with dependencies==2.0.1, unfoldNd)
  and torchao where they are there, 5 MB. With a network, for the other machine's version of Python::

      pip download --only-binary=:all: --no-deps --python-version 3.12 -d wheels jsonargparse docstring-parser ...

  and there ``pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=site``.

The images are unpacked into ``$LQKD_CACHE``, else ``~/.cache/lqkd``, once a machine.

**What comes back** is DIR: tables of a few kilobytes, ``runs/NAME.json`` with the curve of each training, ``weights``
of float trainings (1 MB each) and ``states`` of those that were cut (2 MB each), which a next visit needs to go on.
``tar cf DIR.tar DIR`` where few files travel. Give the command two minutes less than the stay has: it ends within
``--minutes``, but starting and copying count as well.

Without a GPU it does the same on the CPU; ``--scale 0.001`` is the rehearsal that a machine without one has time for.
"""
