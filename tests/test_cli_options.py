"""Every option of every command: one name for one meaning, one meaning for one name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from simexplain_cli.main import cli
from simexplain_cli.method_options import MethodText, method_from
from simexplain_cli.options import Command

from simexplain.errors import ArgumentError
from simexplain.methods.similarity_attention import SimilarityAttention
from simexplain.renaming import RENAMED_OPTIONS, new_name

# Commands that write one file and commands that write a folder of files.
SEVERAL_MEANINGS = {"--out": {"Folder to write", "File to write"}}
ODD = re.compile(r"\b(told|tells|said|says of|asked|sought|is no|are no|whole or not)\b")


def commands(group: click.Command = cli, name: str = "") -> Iterator[tuple[str, click.Command]]:
    if not isinstance(group, click.Group):
        yield name, group
        return
    context = click.Context(group)
    for own in group.list_commands(context):
        result = group.get_command(context, own)
        assert result is not None
        yield from commands(result, f"{name} {own}".strip())


COMMANDS = dict(commands())
OPTIONS = [
    (name, option)
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option)
]


def meaning(option: click.Option) -> str:
    """Its help up to what differs from command to command: details and defaults."""
    return re.split(r"[:;\[]", option.help or "")[0].strip(" .")


def flags(option: click.Option) -> list[str]:
    return [*option.opts, *option.secondary_opts]


def test_an_option_means_the_same_in_every_command() -> None:
    result: dict[str, set[str]] = defaultdict(set)
    for _, option in OPTIONS:
        for flag in flags(option):
            result[flag].add(meaning(option))
    several = {flag: means for flag, means in result.items() if len(means) > 1}
    assert several == SEVERAL_MEANINGS


def test_a_meaning_has_one_option_in_all_commands() -> None:
    result: dict[str, set[str]] = defaultdict(set)
    for _, option in OPTIONS:
        result[meaning(option)].add(flags(option)[0])
    # The same switch, from its other side.
    result["Random weights"].discard("--pretrained")
    assert {means: names for means, names in result.items() if len(names) > 1} == {}


def test_options_of_one_name_take_the_same_kind_of_value() -> None:
    result: dict[str, set[object]] = defaultdict(set)
    for _, option in OPTIONS:
        for flag in flags(option):
            kind = option.type
            number = getattr(kind, "name", "").removesuffix(" range")
            result[flag].add(number.replace("path", "text").replace("directory", "text"))
    assert {flag: kinds for flag, kinds in result.items() if len(kinds) > 1} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_plain_english(name: str) -> None:
    command = COMMANDS[name]
    assert isinstance(command, Command), "it would not take the options of the last version"
    text = re.sub(r"\s+", " ", command.help or "")
    assert text[:1].isupper()
    assert not ODD.search(text), text
    odd = []
    for option in command.params:
        if not isinstance(option, click.Option) or option.name == "help":
            continue
        record = option.help or ""
        whole = re.fullmatch(r"[A-Z].*(\.|\])", record, re.DOTALL) and meaning(option)
        # A help that begins so leaves out what it is of.
        bare = record.startswith(("Of ", "By ", "For ", "Likewise"))
        if not whole or bare or ODD.search(record):
            odd.append((option.opts[0], record))
    assert not odd


SHOWN = {"": cli, "evaluate": cli.get_command(click.Context(cli), "evaluate"), **COMMANDS}


def shown(name: str, word: str) -> list[str]:
    """What a command prints for ``--help`` or ``--help-all``, on 100 columns."""
    program = f"simexplain {name}".strip()
    result = CliRunner().invoke(SHOWN[name], [word], prog_name=program, terminal_width=100)
    assert result.exit_code == 0
    return result.output.splitlines()


@pytest.mark.parametrize("name", SHOWN)
def test_help_fits_a_screen_and_says_where_the_rest_is(name: str) -> None:
    lines = shown(name, "--help")
    assert len(lines) <= 40, "\n".join(lines)
    assert max(map(len, lines)) <= 100
    rare = [option for own, option in OPTIONS if own == name and option.rare]
    named = {flag for line in lines for flag in re.findall(r"^  (?:-\w, )?(--[a-z-]+)", line)}
    assert not named & {flag for option in rare for flag in flags(option)}
    assert (lines[-1] == f"All options: simexplain {name} --help-all") == bool(rare)
    if rare:
        everything = shown(name, "--help-all")
        headings = [line for line in everything if re.fullmatch(r"[A-Z][\w ,]*:", line)]
        assert headings[0] == "Options:"
        text = "\n".join(everything)
        for own, option in OPTIONS:
            if own == name:
                assert re.search(rf"^  .*{option.opts[-1]}\b", text, re.M), option.opts
                assert f"{option.group or 'Options'}:" in headings
        assert "--help-all" not in everything[-1]


def test_a_long_text_is_cut_to_its_first_clause_in_help_alone() -> None:
    brief, full = ("\n".join(shown("explain", word)) for word in ("--help", "--help-all"))
    assert "quadruplet, with 2 negatives" not in brief
    assert "What is compared. [siamese for 2 images, triplet for 3]" in " ".join(brief.split())
    assert "quadruplet, with 2 negatives" in " ".join(full.split())
    assert "x>=1" not in "\n".join(shown("train", "--help"))
    assert "x>=1" in "\n".join(shown("train", "--help-all"))


def test_every_renamed_option_is_taken_somewhere() -> None:
    known: dict[str, list[str]] = defaultdict(list)
    for name, option in OPTIONS:
        known[name] += [flag.lstrip("-").replace("-", "_") for flag in flags(option)]
    for old in set(RENAMED_OPTIONS) - {"broken", "left_out"}:
        where = [name for name, own in known.items() if new_name(old, own, RENAMED_OPTIONS)]
        assert where, f"nothing was called --{old}"


OLD = [
    ("explain", "m a b --different --magnify 2", "m a b --negative --upscale 2"),
    ("explain", "m a b --style contour", "m a b --style contour"),
    ("compare", "m a b --masking each --steps 3 --max-batch 4",
     "m a b --perturb single --curve-steps 3 --batch-size 4"),
    ("compare", "m a b --masking=together --different", "m a b --perturb=joint --negative"),
    ("compare", "m a b --method sam:magnify=2", "m a b --method sam:magnify=2"),
    ("evaluate faithfulness", "m . --level 0.9 --steps 5", "m . --confidence 0.9 --curve-steps 5"),
    ("evaluate retrieval", "m . --k 1 --k 10", "m . --ranks 1,10"),
    ("evaluate reid", "m . --k 5 --dataset cuhk03", "m . --ranks 5 --kind cuhk03"),
    ("segment", "m a b --by box --several together", "m a b --refine box --aggregate together"),
    ("match", "m a b --style zhu --steps 3", "m a b --formula zhu --jacobians 3"),
    ("index", "m . --out i --steps 3", "m . --out i --jacobians 3"),
    ("search", "m a i --mask q.png -k 3", "m a i --region-mask q.png -k 3"),
    ("fit", "m . --out f --nodes 8 --steps 9",
     "m . --out f --nodes-per-level 8 --reliability-batches 9"),
    ("train", ". --out r --classes 4 --each 3 --k 9 --ks 1,2 --steps 5 --watch 2 --no-pretrained",
     ". --out r --classes-per-batch 4 --images-per-class 3 --edges-per-node 9 --ranks 1,2 "
     "--batches-per-epoch 5 --attention-triplets 2 --untrained"),
    ("train", ". --out r --nodes 2", ". --out r --nodes 2"),
    ("batch", "m c.csv --out o --magnify 2 --nodes 2", "m c.csv --out o --upscale 2 --nodes 2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), OLD)
def test_old_spellings_mean_the_new_ones(
    name: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[name]
    wanted = command.make_context(name, new.split()).params
    assert not capsys.readouterr().err or "sam:magnify" in new
    assert command.make_context(name, old.split()).params == wanted
    noted = capsys.readouterr().err.splitlines()
    renamed = [word for word in old.split() if word.startswith("--") and word not in new.split()]
    for word in {word.partition("=")[0] for word in renamed}:
        (line,) = [line for line in noted if f"'{word}'" in line]
        assert line.startswith(f"Note: '{word}' is now called '--"), line
    assert len(noted) <= len(renamed) + 1


def test_words_after_two_dashes_are_left_alone() -> None:
    command = COMMANDS["explain"]
    params = command.make_context("explain", ["m", "--", "--different", "b"]).params
    assert (params["anchor"], params["other"]) == ("--different", ("b",))


def test_every_method_option_is_of_one_kind() -> None:
    kinds = {n: type(o.type) for n, o in OPTIONS if "--method" in o.opts}
    assert set(kinds) == {
        "explain", "batch", "segment", "compare", "evaluate faithfulness", "evaluate segmentation",
    }  # fmt: skip
    assert set(kinds.values()) == {MethodText}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("explain", "m {} b.jpg"), ("explain", "m a.jpg b.jpg --out {}"), ("search", "m {} i"),
        ("index", "m {} --out i"), ("train", "{} --out o"), ("segment", "m a.jpg {}"),
        ("segment", "m a.jpg b.jpg --support-mask {}"), ("batch", "m {} --out o"),
        ("evaluate reid", "m {}"), ("attribute", "m {} b.jpg"), ("bank", "m {} --out o"),
    ],
)  # fmt: skip
def test_addresses_on_the_web_get_a_sentence(name: str, words: str) -> None:
    address = "https://example.org/a.jpg"
    with pytest.raises(ArgumentError, match=f"'{address}' is an address on the web, .* download"):
        COMMANDS[name].make_context(name, words.format(address).split())


def chosen(words: str) -> dict[str, Any]:
    """What ``explain`` passes on of the options of methods."""
    context = COMMANDS["explain"].make_context("explain", ["m", "a", "b", *words.split()])
    network = SimpleNamespace(stages=("low", "high"))
    names = ("method", "layer", "upscale", "weights", "cam", "through_weights", "keep_negative")
    with context:
        result = method_from(network, dict(context.params))  # type: ignore[arg-type]
    return {name: result[name] for name in (*names, "score") if name in result}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("--method sam:weights=signed", "--method sam --weights signed"),
        ("--method sam@layer3:cam=layer_cam", "--method sam --layer layer3 --cam layer_cam"),
        ("--method sam@layer3+layer4", "--method sam --layer layer3 --layer layer4"),
        ("--method similarity_cam:score=held", "--method similarity_cam --option score=held"),
        (
            "--method sam:upscale=2,through_weights=yes",
            "--method sam --upscale 2 --through-weights",
        ),
        ("--method focus:upscale=2 --sweep", "--method focus --upscale 2 --sweep"),
    ],
)
def test_options_inside_a_method_are_those_beside_it(recipe: str, words: str) -> None:
    one, other = chosen(recipe), chosen(words)
    for result in (one, other):
        layer = result.get("layer")
        result["layer"] = (layer,) if isinstance(layer, str) else layer
    assert one == other


def test_rows_may_have_options_of_their_own() -> None:
    plain = chosen("--method sam --method focus")
    assert plain["method"] == ["sam", "focus"]
    result = chosen("--method sam:weights=signed --method sam:weights=relative --method focus")
    assert result["method"] == [
        SimilarityAttention(weights="signed"), SimilarityAttention(weights="relative"), "focus",
    ]  # fmt: skip
    assert chosen("")["method"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method sam:weights=signed --weights paper", "weights is given twice"),
        ("--method sam@layer3 --layer layer4", "layer is given twice"),
        ("--method sam@layer3 --method focus", "--layer"),
        ("--method sam:upscale=2 --method focus", "--upscale"),
        ("--method gradcam", "did you mean similarity_cam?"),
        ("--method sam:weight=signed", "an option of sam"),
        ("--method sam@", "a layer after '@'"),
    ],
)
def test_methods_that_cannot_be_read(words: str, said: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        chosen(words)
    assert said in caught.value.format_message()


@pytest.mark.parametrize("name", ["compare", "segment", "evaluate faithfulness", "batch"])
def test_a_misspelt_method_gets_a_suggestion_everywhere(name: str) -> None:
    words = {"segment": "m a b", "compare": "m a b", "batch": "m c.csv --out o"}.get(name, "m .")
    with pytest.raises(click.BadParameter, match="did you mean occlusion"):
        COMMANDS[name].make_context(name, [*words.split(), "--method", "oclusion"])


@pytest.mark.parametrize(
    ("words", "typed", "wanted"),
    [
        ([], "seg", {"segment"}),
        (["explain", "m", "a"], "--ups", {"--upscale"}),
        (["compare", "m", "a", "--method"], "sim", {"similarity_cam"}),
        (["explain", "m", "a", "--scale"], "", {"image", "shared"}),
        (["evaluate"], "re", {"reid", "retrieval"}),
    ],
)
def test_the_tab_key_completes(words: list[str], typed: str, wanted: set[str]) -> None:
    result = ShellComplete(cli, {}, "simexplain", "_SIMEXPLAIN_COMPLETE").get_completions(
        words, typed
    )
    assert {item.value for item in result} == wanted


# Of other programs: pip, torchrun, mkdocs, the published code of AVSL; and what options begin with.
FOREIGN = {
    "--no-deps", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--strict",
    "--version", "--help", "--help-all", "--not-", "--no-", "--warm", "--step", "--not",
}  # fmt: skip
# Old names stand there on purpose, or options of benchmarks.
SKIPPED = {
    "changelog.md", "contributing.md", "commands.md", "renaming.py", "segmentation-results.md",
    "results.md", "training-results.md", "training-recipes.md",
}  # fmt: skip


def test_options_named_in_errors_and_pages_exist() -> None:
    known = {flag for _, option in OPTIONS for flag in flags(option)} | FOREIGN
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("notebooks/*.ipynb")]
    wrong = []
    for path in (*pages, *root.glob("simexplain/**/*.py"), *root.glob("cli/*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name in SKIPPED:
            continue
        for line in text.splitlines():
            if "benchmarks/" in line or "python docs/scripts" in line:
                continue
            result = re.findall(r"(?<![\w`#|-])`?(--[a-z][a-z0-9-]*)", line)
            wrong += [(path.name, flag) for flag in result if flag not in known]
    assert not wrong, wrong
