import pytest
import torch

from genvision.convert import load_official
from genvision.errors import UserError
from genvision.kernels.draw import draw, draw_tokens
from genvision.models.llamagen import LlamaGen
from genvision.samplers import autoregressive
from genvision.samplers.autoregressive import AutoregressiveSampler
from genvision.samplers.guidance import llamagen_stop
from genvision.samplers.randomness import ImageStreams
from parity_fixtures import Fixture


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = LlamaGen(codebook_size=24, grid_size=3, hidden_dim=32, depth=2, num_heads=4, num_kv_heads=2, num_classes=6, mlp_multiple_of=16)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def first(codes, number):
    """The first tokens of [B, ...] as known ones."""
    known = codes.flatten(1).clone()
    known[:, number:] = -1
    return known.view_as(codes)


class Recorder:
    """Passes everything on and notes how many rows each network call had, and what it answered."""

    def __init__(self, model):
        self.model, self.rows, self.logits = model, [], []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def start(self, condition, *rest):
        logits, cache = self.model.start(condition, *rest)
        self.rows.append(len(condition))
        return logits, cache

    def extend(self, codes, *rest):
        self.rows.append(len(codes))
        return self.model.extend(codes, *rest)


def guided_logits(monkeypatch):
    """A list of what each token is drawn from, [B, V], that fills up while a sampler runs."""
    seen = []

    def watched(logits, uniform, *, guidance_scale, **options):
        conditional, null = logits.chunk(2) if guidance_scale is not None else (logits, logits)
        seen.append(null + (guidance_scale or 1) * (conditional - null))
        return draw_tokens(logits, uniform, guidance_scale=guidance_scale, **options)

    monkeypatch.setattr(autoregressive, "draw_tokens", watched)
    return seen


@pytest.mark.parametrize("setting", ["cfg1", "cfg4", "cfg4_interval5", "cfg1p5", "cfg4_interval0"])
def test_greedy_tokens_equal_the_official_ones(setting, monkeypatch):
    fixture = Fixture("llamagen_generate")
    model = load_official("llamagen-gpt", fixture.state, fixture.config["model"])
    options = fixture.config["settings"][setting]
    stop = llamagen_stop(options.get("cfg_interval", -1), 16)
    sampler = AutoregressiveSampler(guidance_scale=options["cfg_scale"], guidance_stop=stop, temperature=0.0)
    seen = guided_logits(monkeypatch)
    tokens = sampler.sample(model, fixture.inputs["labels"], ImageStreams(0, range(3)))
    assert torch.equal(tokens.flatten(1), fixture.outputs[f"{setting}/tokens"])
    torch.testing.assert_close(torch.stack(seen, 1), fixture.outputs[f"{setting}/logits"], atol=fixture.atol, rtol=0)


@pytest.mark.parametrize(("setting", "scale"), [("gen_cfg1", 1.0), ("gen_cfg7p5", 7.5)])
def test_greedy_tokens_from_text_equal_the_official_ones(setting, scale, monkeypatch):
    fixture = Fixture("llamagen_gpt_t2i")
    model = load_official("llamagen-gpt", fixture.state, fixture.config)
    sampler = AutoregressiveSampler(guidance_scale=scale, temperature=0.0)
    seen = guided_logits(monkeypatch)
    tokens = sampler.sample(model, fixture.inputs["caption"], ImageStreams(0, range(3)), condition_mask=fixture.inputs["emb_mask"])
    assert torch.equal(tokens.flatten(1), fixture.outputs[f"{setting}/tokens"])
    torch.testing.assert_close(torch.stack(seen, 1), fixture.outputs[f"{setting}/logits"], atol=fixture.atol, rtol=0)


def test_same_images_whatever_the_batch_size(model):
    labels = torch.arange(16) % 6
    sampler = AutoregressiveSampler(guidance_scale=2.0, top_p=0.9)

    def images(size):
        parts = [sampler.sample(model, labels[i : i + size], ImageStreams(7, range(i, min(i + size, 16)))) for i in range(0, 16, size)]
        return torch.cat(parts)

    assert torch.equal(images(1), images(16))
    assert torch.equal(images(4), images(16))
    assert torch.equal(images(5), images(16))
    other = sampler.sample(model, labels, ImageStreams(8, range(16)))
    assert not torch.equal(other, images(16))


def test_codes_that_are_no_grid_come_as_sequences():
    model = LlamaGen(codebook_size=24, sequence_length=7, hidden_dim=32, depth=2, num_heads=4, num_classes=6, mlp_multiple_of=16).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    labels, sampler = torch.arange(6), AutoregressiveSampler(guidance_scale=2.0, guidance_stop=0.5)
    together = sampler.sample(model, labels, ImageStreams(7, range(6)))
    assert together.shape == (6, 7) and sampler.network_calls(model) == 7 + 4
    alone = [sampler.sample(model, labels[i : i + 1], ImageStreams(7, [i])) for i in range(6)]
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(sampler.sample(model, labels, ImageStreams(7, range(6)), known=first(together, 3)), together)


def test_outside_the_interval_the_null_rows_are_not_computed(model):
    recorder = Recorder(model)
    AutoregressiveSampler(guidance_scale=3.0, guidance_start=3 / 9, guidance_stop=6 / 9).sample(
        recorder, torch.tensor([0, 1]), ImageStreams(0, range(2))
    )
    # three plain tokens, one pass that catches the null rows up, three guided tokens, three plain ones
    assert recorder.rows == [2, 2, 2, 2, 4, 4, 4, 2, 2, 2]


def test_guidance_that_begins_late_equals_null_rows_kept_from_the_start(model):
    labels, noise = torch.tensor([0, 4]), ImageStreams(1, range(2))
    late = AutoregressiveSampler(guidance_scale=3.0, guidance_start=4 / 9).sample(model, labels, noise)
    tokens = torch.zeros(2, 0, dtype=torch.int64)
    from genvision.streams import Purpose

    uniform = noise.uniform(Purpose.TOKEN, 9)
    for i in range(9):
        conditional = model(tokens, labels)[:, -1]
        if i >= 4:
            null = model(tokens, torch.full_like(labels, model.null_label))[:, -1]
            conditional = null + 3.0 * (conditional - null)
        tokens = torch.cat([tokens, draw(conditional.softmax(-1), uniform[:, i])[:, None]], 1)
    assert torch.equal(late.flatten(1), tokens)


def test_scheduled_guidance_equals_the_formula(model):
    labels, noise = torch.tensor([2, 3, 5]), ImageStreams(1, range(3))
    sampler = AutoregressiveSampler(guidance_scale=4.0, guidance_schedule="linear", temperature=0.0)
    tokens = torch.zeros(3, 0, dtype=torch.int64)
    for i in range(9):
        conditional, null = model(tokens, labels)[:, -1], model(tokens, torch.full_like(labels, 6))[:, -1]
        tokens = torch.cat([tokens, (null + (1 + 3 * i / 8) * (conditional - null)).argmax(-1, keepdim=True)], 1)
    assert torch.equal(sampler.sample(model, labels, noise).flatten(1), tokens)


def test_known_tokens_are_kept_and_the_rest_is_as_if_drawn(model):
    labels, noise = torch.tensor([1, 5]), ImageStreams(2, range(2))
    sampler = AutoregressiveSampler(guidance_scale=1.5)
    whole = sampler.sample(model, labels, noise)
    other = sampler.sample(model, labels, ImageStreams(3, range(2)))
    known = first(whole, 5)
    assert torch.equal(sampler.sample(model, labels, noise, known=known), whole)
    assert torch.equal(sampler.sample(model, labels, noise, known=known.flatten(1)), whole)
    completed = sampler.sample(model, labels, noise, known=first(other, 5))
    assert torch.equal(completed.flatten(1)[:, :5], other.flatten(1)[:, :5]) and not torch.equal(completed, other)
    assert torch.equal(known, first(whole, 5))


def test_where_all_or_no_tokens_are_known(model):
    labels, noise, sampler = torch.tensor([1, 5]), ImageStreams(2, range(2)), AutoregressiveSampler(guidance_scale=1.5)
    recorder, given = Recorder(model), torch.arange(18).view(2, 3, 3)
    assert torch.equal(sampler.sample(recorder, labels, noise, known=given), given)
    assert recorder.rows == [] and sampler.calls.tolist() == [0, 0]
    assert torch.equal(sampler.sample(model, labels, noise, known=torch.full((2, 9), -1)), sampler.sample(model, labels, noise))
    assert sampler.calls.tolist() == [18, 18]


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ([[1, 2, -1, 4, -1, -1, -1, -1, -1]] * 2, "raster order.* masked tokens take any"),
        ([[-1, 2, 3, 4, 5, 6, 7, 8, 9]] * 2, "must be the first ones"),
        ([[1, 2, -1, -1, -1, -1, -1, -1, -1], [1, -1, -1, -1, -1, -1, -1, -1, -1]], "the same places in all images"),
        ([[1, 2, 3]] * 2, r"int64 \[2, 3\]; int64 \[2, 3, 3\], -1 where"),
        ([[1.0] * 9] * 2, "known tokens are float32"),
        ([[1] * 9], r"int64 \[1, 9\]"),
        ([[24] * 9] * 2, r"lie in 24 \.\. 24; the model has tokens 0 \.\. 23"),
        ([[-2] * 9] * 2, r"lie in -2 \.\. -2"),
    ],
)
def test_known_tokens_that_cannot_be_kept_are_refused(model, known, message):
    with pytest.raises(UserError, match=message):
        AutoregressiveSampler().sample(model, torch.tensor([1, 5]), ImageStreams(2, range(2)), known=torch.tensor(known))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": -1.0},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"guidance_start": 0.9, "guidance_stop": 0.1},
        {"guidance_schedule": "up"},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError):
        AutoregressiveSampler(**options)


def test_labels_beyond_the_classes_are_refused(model):
    for label in (6, -1):
        with pytest.raises(UserError, match=r"classes 0 \.\. 5"):
            AutoregressiveSampler().sample(model, torch.tensor([label]), ImageStreams(0, [0]))


def test_guidance_without_a_null_class_is_refused():
    model = LlamaGen(codebook_size=8, grid_size=2, hidden_dim=16, depth=1, num_heads=2, num_classes=3, class_dropout=0.0).eval()
    AutoregressiveSampler().sample(model, torch.tensor([0]), ImageStreams(0, [0]))
    with pytest.raises(UserError, match="class_dropout"):
        AutoregressiveSampler(guidance_scale=2.0).sample(model, torch.tensor([0]), ImageStreams(0, [0]))


def test_saved_options_come_back(tmp_path):
    sampler = AutoregressiveSampler(guidance_scale=2.0, top_k=50).with_options(temperature=0.5, top_p=None)
    sampler.save_pretrained(tmp_path)
    again = AutoregressiveSampler.from_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert (again.config.guidance_scale, again.config.top_k, again.config.temperature, again.config.top_p) == (2.0, 50, 0.5, 1.0)
    with pytest.raises(UserError, match="no option 'num_steps'"):
        sampler.with_options(num_steps=5)
