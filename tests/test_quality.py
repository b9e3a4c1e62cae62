"""benchmarks/quality: the data, the model, and a single run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.quality import corpora, model, settings, studies, tasks, training
from benchmarks.quality.methods import METHODS, prepare

from losia_pro import LosiaConfig

TOY = settings.SIZES["toy"]
CPU = torch.device("cpu")


# --- data ---------------------------------------------------------------------------------------------


SIGNATURES = {
    "def f(self, a, b: int = 3, *args: str, c, d=(1, 2), **kw) -> dict[str, int]:": "self a [b] *args c= [d] **kw",
    "    def g(x, /, y=None):": "x [y]",
}


def test_a_signature_becomes_its_parameters():
    source = "\n".join([*SIGNATURES, "def one(x):", "def broken(a, b:"])
    found = dict(tasks.signatures(source))
    assert found == {line.strip(): answer for line, answer in SIGNATURES.items()}


def test_an_import_becomes_assignments():
    source = (
        "from a.b import c, d as e\nfrom . import x\nfrom __future__ import y\nfrom q import *\n"
    )
    assert dict(tasks.imports(source)) == {
        "from a.b import c, d as e": "import a.b; c = a.b.c; e = a.b.d"
    }


def test_parameters_in_order():
    source = "\n".join([*SIGNATURES, "def two(x, y):", "def B(self, b, A=1, *, _c):"])
    assert dict(tasks.order(source)) == {
        next(iter(SIGNATURES)): "a args b c d kw self",
        "def B(self, b, A=1, *, _c):": "A _c b self",
    }


PARENS = {
    "if not a and b.c(d) - 1 < e:": "((not a) and ((b.c(d) - 1) < e))",
    "return a - (b - c) - -d[i + 1]": "((a - (b - c)) - (-d[i + 1]))",
    "x = a or b or c if d else e": None,  # one operator inside, none of its own
    "y = 0 <= i < n": "(0 <= i < n)",
    "z = a is not b or 'x' not in  c": "((a is not b) or ('x' not in c))",
    "if a + b:": None,
    "return": None,
    "w = (": None,
    "u = (a -\r b * c)": None,  # two lines to Python
    "v = 2 ** 3 // 4 @ m": "(((2 ** 3) // 4) @ m)",
}


def test_an_expression_gets_all_its_parentheses():
    source = "\n".join(f"    {line}" for line in PARENS)
    assert dict(tasks.parens(source)) == {k: v for k, v in PARENS.items() if v}


def test_parentheses_change_no_value():
    names = dict.fromkeys("abcde", 3) | {"i": 1, "n": 2}
    for line, answer in tasks.parens(
        "return a - b * -c ** 2 % d\nreturn not a == b or c and d < e <= a\n"
    ):
        assert eval(answer, {}, names) == eval(line.removeprefix("return "), {}, names)


def test_no_prompt_is_in_two_parts():
    text = "\n".join(f"from module{k} import name{k}" for k in range(9))
    first = tasks.examples("imports", [text], 100, 4)
    rest = tasks.examples("imports", [text, text], 100, 99, first)
    assert len(first) == 4 and len(rest) == 5 and not first.keys() & rest.keys()


def test_the_loss_is_on_the_answer_and_its_end_alone():
    part = corpora.encode({"ab=> ": "xy"}, 12)
    assert bytes(part.rows[0].tolist()) == b"ab=> xy" + bytes(5)
    assert (part.first.item(), part.last.item()) == (5, 8)
    _, counts, _ = model.token_losses(model.build(TOY, CPU), part)
    assert counts[0].nonzero().flatten().tolist() == [4, 5, 6]  # predict x, y and the end


def test_windows_are_the_text_once():
    part = corpora.windows(["abcdefgh", "ijklmnop"], 4, None)
    whole = b"abcdefgh\0ijklmnop\0"
    assert sorted(bytes(r.tolist()) for r in part.rows) == sorted(
        whole[k : k + 5] for k in (0, 4, 8, 12)
    )
    assert set(part.first.tolist()) == {0} and set(part.last.tolist()) == {5}


def test_held_out_files_that_repeat_training_lines_are_left_out(monkeypatch):
    names = [f"file{k}" for k in range(60)]
    lines = [f"a line that is long enough, number {k}" for k in range(60)]
    texts = {n: f"{line}\n" for n, line in zip(names, lines, strict=True)}
    held_out = [n for n in names if corpora.sources.share(n, "split") < corpora.TEST]
    train = [n for n in names if n not in held_out]
    copied, alone = held_out[0], held_out[1]
    texts[copied] = texts[train[0]] + texts[train[1]]
    monkeypatch.setattr(corpora.sources, "texts", lambda _: iter(texts.items()))
    found = corpora.split(None, 10**9)
    kept = found["valid"] + found["test"]
    assert texts[copied] not in kept and texts[alone] in kept
    assert len(kept) == len(held_out) - 1 and len(found["train"]) == len(train)


# --- model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return model.build(TOY, CPU)


def text_part(rows: int = 8) -> corpora.Part:
    source = Path(corpora.__file__).read_text()
    return corpora.Part(*(t[:rows] for t in corpora.windows([source], TOY.length, None)))


def test_attention_without_a_mask_is_causal(untrained):
    ids = text_part().rows[:2, :-1].long()
    with torch.no_grad():
        mine = untrained(input_ids=ids, use_cache=False).logits
        untrained.set_attn_implementation("eager")
        theirs = untrained(input_ids=ids, use_cache=False).logits
        untrained.set_attn_implementation("causal")
    assert not torch.equal(mine, theirs.roll(1, dims=1))
    torch.testing.assert_close(mine, theirs)


def test_exact_match_is_what_greedy_decoding_gives():
    """A model that has learnt some of a few answers, so that both outcomes occur."""
    torch.manual_seed(0)
    words = ["cat", "horse", "bird", "elephant", "dog", "mouse"]
    part = corpora.encode({f"{w}=> ": w[::-1] for w in words}, 24)
    net = model.build(TOY, CPU)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    outcomes = set()
    for _ in range(60):
        model.training_loss(net, part).backward()
        optimizer.step()
        optimizer.zero_grad()
        right = 0
        for w in words:
            ids = torch.tensor([list(f"{w}=> ".encode())])
            wanted = [*w[::-1].encode(), corpora.END]
            for _ in wanted:
                with torch.no_grad():
                    following = net(input_ids=ids).logits[0, -1].argmax()
                ids = torch.cat([ids, following.view(1, 1)], dim=1)
            right += ids[0, -len(wanted) :].tolist() == wanted
        outcomes.add(right)
        assert model.evaluate(net, part, 4)[1] == right / len(words)
        if right == len(words):
            break
    assert len(outcomes) > 1


def test_every_row_comes_once_before_any_again():
    part = corpora.Part(torch.arange(10)[:, None], torch.zeros(10), torch.zeros(10))
    seen = torch.cat([b.rows for b in model.batches(part, 4, 5, seed=1)]).flatten().tolist()
    assert len(seen) == 20
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    again = torch.cat([b.rows for b in model.batches(part, 4, 5, seed=1)]).flatten().tolist()
    other = torch.cat([b.rows for b in model.batches(part, 4, 5, seed=2)]).flatten().tolist()
    assert again == seen != other


def test_a_saved_base_model_is_read_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "VALUES", 50_000)  # several files
    base = model.pretrain(settings.dataclasses.replace(TOY, pretrain_steps=1), text_part(), False)
    other = model.build(TOY, CPU)
    assert not model.load(other, tmp_path)
    model.save(base, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert model.load(other, tmp_path) and model.digest(other) == model.digest(base)
    for a, b in zip(base.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_same_base_model_is_made_again_and_nothing_stays_deterministic(monkeypatch):
    """A sum of many terms into one place is refused, or summed in an order, while it is made."""
    seen = []
    loss = model.training_loss

    def watched(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return loss(*args)

    monkeypatch.setattr(model, "training_loss", watched)
    setting = settings.dataclasses.replace(TOY, pretrain_steps=2)
    first, second = (model.pretrain(setting, text_part(), False) for _ in range(2))
    assert model.digest(first) == model.digest(second)
    assert seen == [True] * 4 and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setattr(model, "training_loss", 0)  # which cannot be called
    with pytest.raises(TypeError):
        model.pretrain(setting, text_part(), False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_base_model_that_diverges_is_refused():
    setting = settings.dataclasses.replace(TOY, pretrain_steps=3, pretrain_lr=1e30)
    with pytest.raises(
        FloatingPointError, match="at step 2 of 3 .* a lower pretrain_lr than 1e.30"
    ):
        model.pretrain(setting, text_part(), False)


def fits(name: str) -> bool:
    """Whether the toy's subnets hold a run of a configuration's neurons."""
    method = METHODS[name]
    return method.kind != "losia" or LosiaConfig(**method.settings).n_in(TOY.hidden) > 0


def larger():
    return model.build(settings.SIZES["26m"], torch.device("cpu"))


@pytest.mark.parametrize("name", [m for m in METHODS if ": " not in m and fits(m)])
def test_every_method_trains_what_it_says_and_leaves_the_base_alone(name, untrained):
    part = text_part()
    domain = {"train": part, "valid": part, "test": part}
    before = model.digest(untrained)
    setting = settings.dataclasses.replace(TOY, steps=2)
    job = {"method": name, "target": "cpp", "lr": 1e-2, "seed": 0}
    row = training.tune(setting, untrained, {"cpp": domain, "python": domain}, job, False)
    again = training.tune(setting, untrained, {"cpp": domain, "python": domain}, job, False)
    assert row["test_loss"] == again["test_loss"] < model.evaluate(untrained, part, 8)[0]
    assert model.digest(untrained) == before
    assert 0 < row["trainable"] <= sum(p.numel() for p in untrained.parameters())
    area = METHODS[name].area
    if area:  # as many as the subnets' to half a rank
        shapes = [
            m.weight.shape for n, m in untrained.named_modules() if "layers" in n and "proj" in n
        ]
        half = sum(map(sum, shapes)) / 2
        assert abs(row["trainable"] - area * sum(a * b for a, b in shapes)) <= half


@pytest.mark.parametrize("study", studies.STUDIES)
def test_every_configuration_of_a_study_fits_the_smallest_model(study, untrained):
    """But for runs of neurons that are longer than its subnets."""
    for name in studies.names(study):
        if METHODS[name].settings.get("init") != "calibrate":
            base = copy.deepcopy(untrained) if fits(name) else larger()
            assert prepare(METHODS[name], base, 0, list).trainable > 0


def test_a_sequence_tunes_on_from_the_weights_that_the_last_tuning_left(untrained):
    """At learning rate 1e-5 and a last rate of nothing, what the first tuning did is all there is."""
    part = text_part()
    first = {"train": part, "valid": part, "test": part}
    rows = corpora.Part(part.rows.flip(0, 1).contiguous(), part.first, part.last)
    second = {"train": rows, "valid": rows, "test": rows}
    domains = {"cpp": first, "docs": second, "python": first}
    setting = settings.dataclasses.replace(TOY, steps=3)
    for name in ("full", "lora-r8", "losia-1/4"):
        alone = {"method": name, "target": "cpp", "lr": 1e-2, "seed": 0}
        both = {**alone, "target": "docs", "lr": 0.0, "before": (("cpp", -4),)}
        one = training.tune(setting, untrained, domains, alone, False)
        row = training.tune(setting, untrained, domains, both, False)
        assert row["sequence"] == ["cpp", "docs"] and len(row["matrix"]) == 2
        assert row["matrix"][0] == row["matrix"][1]
        assert row["matrix"][0][0] == pytest.approx(
            one["test_loss"], rel=1e-5
        )  # merged: rounding of a sum
        assert row["matrix"][0][0] < model.evaluate(untrained, part, 8)[0]
