"""One call from networks and loaders to a student that can be taken away."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lqkd
from lqkd import Recipe, UsageError
from lqkd.balances import GradientBalance, UncertaintyBalance
from lqkd.cli import main
from lqkd.data import Digits
from lqkd.losses import HintonKL, Hints
from lqkd.models import CifarResNet, SmallFCOS, load_weights
from lqkd.modules import Tap, Term
from lqkd.pipelines import guess_task
from lqkd.regularizers import LearnableTable
from lqkd.tasks import Classification, Detection, KeyedClassification, MultiLabel, Segmentation


def network(width: int, seed: int = 0) -> nn.Sequential:
    """Of images 1x8x8, three classes."""
    torch.manual_seed(seed)
    inner = (nn.Conv2d(width, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), *inner, *head)


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images whose class is the third of them that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator) / 2
    for image, label in zip(images, labels, strict=True):
        image[:, :, 2 * label : 2 * label + 3] += 2
    return images, labels


def loader(count: int, seed: int, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(*rows(count, seed)), batch_size=32, shuffle=shuffle)


def learned(net: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """The network, trained in floating point."""
    images, labels = rows(256, 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy((call or net)(images), labels).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to run in, without pictures, which take longer than these trainings."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder := tmp_path_factory.mktemp("place"))
        patched.setattr("lqkd.callbacks.regularizer.pictures.pictures", lambda *history: iter(()))
        yield folder


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    return learned(network(4, seed=1)), learned(network(16))


@pytest.fixture(scope="module")
def made(networks: tuple[nn.Module, nn.Module]) -> lqkd.Distilled:
    student, teacher = networks
    splits = loader(256, 0, shuffle=True), loader(64, 1)
    return lqkd.distill(student, teacher, *splits, test=loader(64, 2), bits="w4a4", epochs=2)


BRIEF: dict[str, Any] = {"epochs": 1, "trainer": {"enable_progress_bar": False}}


def test_a_student_comes_back_with_what_was_measured_of_it(made: lqkd.Distilled) -> None:
    images, labels = rows(64, 2)
    with torch.no_grad():
        right = (made.network(images).argmax(dim=1) == labels).float().mean()
    assert not made.network.training
    assert made.summary["test"] == pytest.approx(float(right))
    assert right > 0.9
    assert made.summary["teacher"] > 0.9
    assert made.summary["student_float"] > 0.9
    assert made.summary["weight_bits"] == "4 (8 in 2 layers)"
    assert made.summary["finished"]
    assert json.loads((made.folder / "summary.json").read_text()) == made.summary
    assert "on test" in repr(made)
    assert str(made.folder) in repr(made)


def test_the_best_epoch_is_what_comes_back(made: lqkd.Distilled) -> None:
    kept = torch.load(made.folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(kept[f"student.{name}"], value) for name, value in made.network.state_dict().items())


def test_an_epoch_that_was_better_than_the_last_comes_back(networks: tuple[nn.Module, nn.Module]) -> None:
    class Spoil(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.student[-1].weight.data.neg_()

    trainer = {"callbacks": Spoil(), "enable_progress_bar": False}
    made = lqkd.distill(*networks, loader(32, 0), loader(64, 1), epochs=2, trainer=trainer)
    images, labels = rows(64, 1)
    with torch.no_grad():
        right = (made.network(images).argmax(dim=1) == labels).float().mean()
    assert made.summary["val"] == pytest.approx(float(right))
    assert right > 0.9


def test_a_file_is_proven_to_answer_like_the_student(made: lqkd.Distilled, tmp_path: Path) -> None:
    file = made.export(tmp_path / "student.onnx", about={"class_names": ["top", "middle", "bottom"]})
    session = onnxruntime.InferenceSession(file)
    images, _ = rows(64, 3)
    with torch.no_grad():
        expected = made.network(images).argmax(dim=1)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert (torch.from_numpy(logits).argmax(dim=1) == expected).float().mean() > 0.98
    assert "middle" in session.get_modelmeta().custom_metadata_map["lqkd.class_names"]
    with pytest.raises(UsageError, match="exists: give overwrite=True"):
        made.export(file)
    assert made.export(file, overwrite=True) == file


def test_a_program_is_written_by_the_same_door(made: lqkd.Distilled) -> None:
    network = torch.export.load(made.export(format="torch")).module()
    images, _ = rows(64, 3)
    with torch.no_grad():
        assert (network(images).argmax(1) == made.network(images).argmax(1)).float().mean() > 0.98


def test_a_folder_for_ncnn_is_written_where_its_layers_read_the_grids(made: lqkd.Distilled, tmp_path: Path) -> None:
    pytest.importorskip("ncnn")
    with pytest.raises(UsageError, match="train the student with quantization"):
        made.export(tmp_path / "student.ncnn", format="ncnn")
    with pytest.raises(UsageError, match="the format ncnn writes a folder: use mine"):
        made.export(tmp_path / "mine.onnx", format="ncnn")


def test_what_a_file_says_by_itself_is_not_said_otherwise(made: lqkd.Distilled, tmp_path: Path) -> None:
    for about, message in (({"bits": "w2a2"}, "the file says version, format, bits"), ({"x": object()}, "JSON")):
        with pytest.raises(UsageError, match=message):
            made.export(tmp_path / "student.onnx", about=about)
    with pytest.raises(UsageError, match="is a folder"):
        made.export(tmp_path)


def test_a_page_tells_of_the_run(made: lqkd.Distilled) -> None:
    page = made.report().read_text()
    assert f"{made.summary['test']:.2%}"[:4] in page
    assert "Made by lqkd.distill from Python" in page


def test_networks_that_are_given_stay_as_they_are(networks: tuple[nn.Module, nn.Module]) -> None:
    before = copy.deepcopy(networks)
    lqkd.distill(*networks, loader(32, 0), **BRIEF)
    for old, new in zip(before, networks, strict=True):
        assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
        assert all(parameter.requires_grad for parameter in new.parameters())
        assert not new.training


def test_the_same_call_gives_the_same_student(networks: tuple[nn.Module, nn.Module]) -> None:
    def student() -> dict[str, Tensor]:
        return lqkd.distill(*networks, loader(64, 0, shuffle=True), seed=3, **BRIEF).network.state_dict()

    first, second = student(), student()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_settings_that_are_trained_are_as_new_in_the_next_call(networks: tuple[nn.Module, nn.Module]) -> None:
    balance, regularizer = UncertaintyBalance(), LearnableTable()

    def student() -> dict[str, Tensor]:
        settings = {"balance": balance, "regularizer": regularizer, "label_smoothing": 0.1}
        return lqkd.distill(*networks, loader(64, 0), **settings, **BRIEF).network.state_dict()

    first, second = student(), student()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_batches_without_end_are_read_for_as_many_steps_as_are_asked_for(
    networks: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    made = lqkd.distill(*networks, Endless(), loader(32, 1), trainer={"max_steps": 6}, epochs=9)
    monkeypatch.undo()
    assert made.summary["steps"] == 6
    assert made.report().is_relative_to(tmp_path)  # wherever one is by then


def test_a_bar_of_ones_own_takes_the_place_of_ours(networks: tuple[nn.Module, nn.Module]) -> None:
    bar = TQDMProgressBar()
    made = lqkd.distill(*networks, loader(32, 0), epochs=1, trainer={"callbacks": [bar]})
    assert made.module.trainer.progress_bar_callback is bar


def test_several_terms_and_other_balances_are_told_as_they_are(
    networks: tuple[nn.Module, nn.Module], capsys: pytest.CaptureFixture
) -> None:
    student, teacher = networks
    terms = {"near": Term(HintonKL(), "first", weight=5.0), "far": Term(HintonKL(), "second")}
    given = {"teachers": {"first": teacher, "second": student}, "distillation": terms}
    trainer = {"max_steps": 1, "enable_progress_bar": False, "max_time": {"hours": 1}}
    lqkd.distill(student, None, loader(64, 0), epochs=3, accumulate_grad_batches=2, trainer=trainer, **given)
    told = capsys.readouterr().out
    assert "1 of the task, 5 of HintonKL from first (Sequential), 1 of HintonKL from second (Sequential)" in told
    assert "3 epochs of 2 batches, at most 1 steps, at most 3600 s, 2 batches a step" in told
    assert "nothing was measured" in told


def test_every_choice_is_told_and_kept_and_nothing_that_is_no_news(
    networks: tuple[nn.Module, nn.Module],
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    made = lqkd.distill(networks[0], train=loader(64, 0), bits="w8a8", folder=tmp_path / "run", **BRIEF)
    told = capsys.readouterr().out
    assert (
        "task        Classification, told from the first batch, the last epoch is kept: there is no validation" in told
    )
    assert "0.5 of the task, 0.5 of HintonKL from Sequential" in told  # its own network, none was given
    assert "1 epoch of 2 batches, SGD (lr 0.01), on cpu, seed 0" in told
    assert f"run folder  {tmp_path / 'run'}" in told
    assert not [line for line in caplog.messages if "available: " in line or "Seed set" in line or "Tip: " in line]
    assert "there is no validation data" in " ".join(made.summary["warnings"])
    kept = (made.folder / "config.yaml").read_text()
    assert "bits: w8a8" in kept
    assert "seed_everything: 0" in kept


def test_what_distills_can_be_chosen_as_for_the_module(networks: tuple[nn.Module, nn.Module]) -> None:
    made = lqkd.distill(
        *networks,
        loader(64, 0),
        bits=Recipe("w2a4", first_layer_bits=4),
        distillation_loss=Hints(),
        taps=[Tap("2", "2")],
        balance=GradientBalance(),
        student_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        **BRIEF,
    )
    assert isinstance(made.module.balance, GradientBalance)
    assert isinstance(made.module.trainer.optimizers[0], torch.optim.AdamW)
    assert made.network[0].weight_quantizer.bits == 4


def test_callbacks_and_loggers_come_beside_those_of_a_run(networks: tuple[nn.Module, nn.Module]) -> None:
    class Counts(Callback):
        steps = 0

        def on_train_batch_end(self, *given: Any) -> None:
            self.steps += 1

    counts = Counts()
    made = lqkd.distill(*networks, loader(96, 0), epochs=5, trainer={"callbacks": counts, "max_steps": 2})
    assert counts.steps == 2
    assert made.summary["steps"] == 2


def test_a_datamodule_brings_all_splits() -> None:
    student = CifarResNet(8, width=8, in_channels=1)
    load_weights(student, "builtin:digits_student")
    made = lqkd.distill(student, train=Digits(limit_train=128), bits="w4a4", **BRIEF)
    assert made.summary["test"] > 0.8
    file = made.export()
    assert main(["predict", str(file), str(file)]) == 2  # it knows what images it takes, and that is none


# ---- batches of other kinds


class Pair(nn.Module):
    """Takes an image and its mean brightness, by name, and returns a dict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image, self.table, self.head = nn.Linear(64, width), nn.Linear(1, width), nn.Linear(width, 3)

    def forward(self, image: Tensor, table: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.image(image.flatten(1)) + self.table(table))
        return {"hidden": hidden, "logits": self.head(hidden)}


class Endless(IterableDataset):
    """Batches of which nobody knows the number."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(*(part.split(16) for part in rows(64, 0)), strict=True)


class Dicts(Dataset):
    """Samples as Hugging Face's data sets give them."""

    def __init__(self, count: int, label: str) -> None:
        self.images, self.labels = rows(count, 0)
        self.label = label

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        return {"image": image, "table": image.mean()[None], "id": f"{index}.png", self.label: self.labels[index]}


def test_a_network_of_several_inputs_learns_from_dicts_and_is_exported(tmp_path: Path) -> None:
    student, teacher = (
        learned(net := Pair(width), lambda x, net=net: net(x, x.mean((1, 2, 3))[:, None])["logits"])
        for width in (8, 32)
    )
    batches = DataLoader(Dicts(96, "label"), batch_size=32)
    made = lqkd.distill(student, teacher, batches, batches, bits="w8a8", **BRIEF)
    assert isinstance(made.task, KeyedClassification)
    assert made.summary["val"] > 0.9
    session = onnxruntime.InferenceSession(made.export(tmp_path / "pair.onnx"))
    assert {one.name for one in session.get_inputs()} == {"image", "table"}


def test_a_dict_with_one_tensor_needs_no_name_for_it(networks: tuple[nn.Module, nn.Module]) -> None:
    images, labels = rows(64, 0)
    batches = [{"pixel_values": images[part], "labels": labels[part]} for part in (slice(32), slice(32, 64))]
    made = lqkd.distill(*networks, batches, batches, **BRIEF)
    assert made.summary["val"] > 0.9


def test_masks_make_a_segmentation_of_as_many_classes_as_the_student_has() -> None:
    student = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    task = guess_task([torch.randn(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)], student)
    assert isinstance(task, Segmentation)
    assert task.classes == 5


def test_boxes_make_a_detection_of_the_classes_and_levels_that_the_student_has() -> None:
    boxes = [{"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}] * 2
    task = guess_task(([torch.randn(3, 60, 90)] * 2, boxes), SmallFCOS(num_classes=5, width=4))
    assert isinstance(task, Detection)
    assert (task.classes, task.strides, task.reach) == (5, (8, 16, 32), 1.5)
    with pytest.raises(UsageError, match="labels have boxes, and the student returns no maps 'classes_S'"):
        guess_task((torch.randn(2, 3, 64, 64), boxes), nn.Flatten())


def test_marks_make_a_task_of_several_labels(networks: tuple[nn.Module, nn.Module]) -> None:
    images, _ = rows(64, 0)
    marks = torch.stack([images.mean((1, 2, 3)) > 0.5, images.mean((1, 2, 3)) > 0.2, images[:, 0, 0, 0] > 0], dim=1)
    assert isinstance(guess_task((images, marks.float()), networks[0]), MultiLabel)
    batches = [(images, marks.long())]
    assert lqkd.distill(networks[0], train=batches, val=batches, **BRIEF).summary["metric"] == "val/map"


def test_inputs_alone_are_distilled_without_labels(networks: tuple[nn.Module, nn.Module]) -> None:
    assert type(guess_task(torch.randn(4, 1, 8, 8), networks[0])) is Classification


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.randn(4, 3), torch.randn(4)), "cannot be told from labels of float32 and shape (4,)"),
        ((torch.randn(4, 3), torch.eye(4)), "every row of the labels (4, 4) has a single 1: give labels.argmax"),
        ((torch.randn(4, 3), ["a", "b"]), "cannot be told from labels that are a list"),
        ("text", "cannot be told from a batch that is a str"),
        ({"x": torch.randn(4, 3), "y": torch.zeros(4)}, "needs labels under one of 'labels', 'label'"),
        ({"labels": torch.zeros(4, dtype=torch.int64), "a": torch.zeros(4), "b": torch.zeros(4)}, "'a' or 'b'"),
        ({"labels": torch.zeros(4, 7, dtype=torch.int64), "input": torch.zeros(4)}, "'labels' of shape (4, 7)"),
    ],
)
def test_a_task_that_cannot_be_told_is_asked_for(batch: Any, message: str) -> None:
    with pytest.raises(UsageError) as told:
        guess_task(batch, nn.Flatten())
    assert message in str(told.value)


# ---- mistakes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"student": "resnet18"}, "student is a str: a torch.nn.Module is needed"),
        ({"train": None}, "there is nothing to train on: give train"),
        ({"train": 3}, "train is a int"),
        ({"train": []}, "train has no batch"),
        ({"val": iter([])}, "val is an iterator, which can be read once"),
        ({"epochs": 0}, "epochs=0 is not possible"),
        ({"seed": -1}, "seed=-1 is not possible"),
        ({"bits": "w9a9"}, "w9a9"),
        ({"distilation_loss": None}, "did you mean distillation_loss?"),
        ({"quantization": None}, "quantization is no setting of lqkd.distill"),
        ({"trainer": {"max_epochs": 3}}, "trainer['max_epochs'] is not possible: give epochs"),
        ({"trainer": {"max_step": 3}}, "did you mean max_steps?"),
        ({"trainer": {"precision": "16-mixed"}}, "not possible with two optimizers"),
        ({"trainer": {"devices": 999, "accelerator": "cpu", "strategy": "ddp_spawn"}}, "devices=999"),
        ({"teachers": {}}, "teacher is not possible beside teachers"),
        ({"train": {"a": []}}, "train is a dict"),
        ({"train": Endless()}, "train has no length, so that nobody knows when the training ends"),
        ({"seed": 1.5}, "seed=1.5 is not possible"),
        ({"task": Classification}, "an object such as lqkd.tasks.Classification() is needed"),
        ({"distillation_loss": "hinton"}, "distillation_loss='hinton' is not possible"),
        ({"student_optimizer": 0.1}, "student_optimizer=float is not possible"),
        ({"folder": "a\0"}, "a path is needed"),
        ({"trainer": {"callbacks": "x"}}, "Lightning's Callbacks are needed"),
        ({"trainer": {"max_steps": 0}}, "trainer['max_steps']=0 is not possible"),
        ({"trainer": {"devices": 2, "accelerator": "cpu", "strategy": "ddp_spawn"}}, "does not come back"),
        ({"task": Segmentation(3), "label_smoothing": 0.1}, "is a setting of task Segmentation"),
        ({"task": Classification(ignore_index=2), "label_smoothing": 0.1}, "is a setting of task Classification"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_run_behind(
    networks: tuple[nn.Module, nn.Module], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = {"student": networks[0], "teacher": networks[1], "train": loader(32, 0), "folder": tmp_path / "run"}
    with pytest.raises(UsageError) as told:
        lqkd.distill(**{**settings, **given})
    assert message in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_student_that_is_quantised_already_is_refused(made: lqkd.Distilled) -> None:
    with pytest.raises(UsageError, match="quantised already"):
        lqkd.distill(made.network, train=loader(32, 0))


def test_an_untrained_teacher_is_refused_and_leaves_no_run_behind(
    networks: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the teacher is right on"):
        lqkd.distill(networks[0], network(16, seed=5), loader(32, 0), loader(64, 1), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Interrupted(Endless):
    """As if Ctrl-C were pressed when it is read."""

    def __iter__(self) -> Iterator[Any]:
        raise KeyboardInterrupt

    def __len__(self) -> int:
        return 1


def test_ctrl_c_before_the_first_step_leaves_neither_a_folder_nor_a_deaf_process(
    networks: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        lqkd.distill(*networks, loader(32, 0), Interrupted(), folder=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run").exists()


def test_validation_that_is_switched_off_is_not_read(networks: tuple[nn.Module, nn.Module]) -> None:
    trainer = {"limit_val_batches": 0, "enable_progress_bar": False}
    lqkd.distill(*networks, loader(32, 0), Interrupted(), test=loader(32, 1), epochs=1, trainer=trainer)


def test_a_folder_that_holds_something_is_not_written_into(
    networks: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        lqkd.distill(*networks, loader(32, 0), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("verb", ["resume", "export", "sensitivity"])
def test_verbs_that_need_a_configuration_say_that_there_is_none(
    made: lqkd.Distilled, verb: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([verb, str(made.folder.resolve())]) == 2
    assert "was made by lqkd.distill" in capsys.readouterr().err
