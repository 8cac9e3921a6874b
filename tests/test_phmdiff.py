"""The method: what a loss is made of, batch invariance, learning, and getting a slice back."""

from __future__ import annotations

import pytest
import torch

from phmdiff_fast import losses
from phmdiff_fast.config import LevelSpec, ModelConfig, SampleConfig, TrainConfig, build_config
from phmdiff_fast.diffusion import noised
from phmdiff_fast.kernels import _philox
from phmdiff_fast.kernels.mmd import mmd2
from phmdiff_fast.phmdiff import PHMDiff
from phmdiff_fast.sampling import with_detail

SMALL = dict(depth=2, width=64, heads=2, decoder_depth=1, decoder_width=32, decoder_heads=2, patch=4,
             stem_width=8, head_width=8, levels=[LevelSpec(mask_ratio=r) for r in (0.75, 0.5, 0.25)])  # fmt: skip


def small(**more) -> ModelConfig:
    return ModelConfig(**{**SMALL, **more})


def images(n=4, size=32):
    """A smooth shape as source, its inverted and squared version as target."""
    axis = torch.linspace(-1, 1, size)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    source = torch.stack([torch.tanh(4 * (0.6 - (x - 0.1 * i) ** 2 - y**2)) * torch.cos(5 * y) for i in range(n)])[
        :, None
    ]
    return source, (1 - 2 * source**2).clamp(-1, 1)


def one(model, *, masked=True, ids=None, **train):
    source, target = images()
    ids = torch.arange(4) if ids is None else ids
    return model.loss(target[ids % 4], source[ids % 4], ids, (0, 3), TrainConfig(**train), masked=masked)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("masked", [True, False])
def test_loss_of_an_untrained_model_is_known(prediction, masked):
    """The output starts at zero, so the loss is the mean square of what is predicted, level by level."""
    torch.manual_seed(0)
    model = PHMDiff(small(prediction=prediction), 1)
    terms = one(model, masked=masked, mmd_weight=0.0)
    _, target = images()
    truth, expected = target, []
    for level in range(3):
        drawn = _philox.normals(torch.arange(4), truth[0].numel(), rng=(0, 3), stream=1 + level).view_as(truth)
        expected.append((truth if prediction == "x0" else drawn).square().mean())
        truth = torch.nn.functional.avg_pool2d(truth, 2)
    torch.testing.assert_close(terms.denoise, torch.stack(expected))
    torch.testing.assert_close(terms.total.detach(), torch.stack(expected).mean())


def test_level_weights_and_mmd_weight_enter_the_total():
    levels = [LevelSpec(mask_ratio=0.5, weight=w) for w in (3.0, 1.0, 0.0)]
    torch.manual_seed(0)
    terms = one(PHMDiff(small(levels=levels), 1), mmd_weight=0.7)
    expected = (3 * terms.denoise[0] + terms.denoise[1]) / 4 + 0.7 * terms.mmd.sum()
    torch.testing.assert_close(terms.total.detach(), expected)
    assert (terms.mmd > 0).all()


def test_l1_is_the_mean_absolute_difference():
    torch.manual_seed(0)
    terms = one(PHMDiff(small(), 1), loss="l1")
    torch.testing.assert_close(terms.denoise[0], images()[1].abs().mean())


def test_cross_granularity_is_the_mmd_of_the_chosen_rows():
    eps, eps_hat = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    rows = [x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(8, 16) for x in (eps, eps_hat)]
    everything = losses.cross_granularity(eps, eps_hat, 4, 100, torch.arange(2), 0, (0, 0))
    torch.testing.assert_close(everything, mmd2(rows[1], rows[0]))
    keys = _philox.integers(torch.arange(2), 4, rng=(0, 0), stream=24).flatten()
    chosen = keys.argsort()[:5]
    some = losses.cross_granularity(eps, eps_hat, 4, 5, torch.arange(2), 0, (0, 0))
    torch.testing.assert_close(some, mmd2(rows[1][chosen], rows[0][chosen]))


def test_implied_noise_leaves_nearly_clean_samples_out():
    y, eps, abar = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0.5, 0.995])
    x0 = (y + 0.1).requires_grad_()
    implied = losses.implied_noise(noised(y, eps, abar), x0, eps, abar)
    torch.testing.assert_close(implied[0], eps[0] - 0.1)  # sqrt(a) / sqrt(1 - a) = 1 at 0.5
    assert torch.equal(implied[1], eps[1])
    implied.sum().backward()
    assert torch.isfinite(x0.grad).all()
    assert (x0.grad[1] == 0).all()


def test_token_decoder_weighs_hidden_tokens_by_a_tenth():
    torch.manual_seed(0)
    model = PHMDiff(small(decoder_input="token", prediction="eps"), 1)
    terms = one(model, mmd_weight=0.0)
    _, target = images()
    from phmdiff_fast.kernels.patch_mask import draw_mask

    _, inverse = draw_mask(torch.arange(4), 64, 16, rng=(0, 3))
    visible = losses.visible_pixels(inverse, 4, 32, 32)
    eps = _philox.normals(torch.arange(4), 1024, rng=(0, 3), stream=1).view_as(target)
    expected = torch.where(visible, eps.square(), 0.1 * target.square()).mean()
    torch.testing.assert_close(terms.denoise[0], expected)


def test_noise_masks_and_times_do_not_depend_on_how_the_batch_is_split():
    torch.manual_seed(0)
    model = PHMDiff(small(), 1)
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    whole = one(model, mmd_weight=0.0).denoise
    parts = [one(model, ids=torch.tensor(ids), mmd_weight=0.0).denoise for ids in ([0, 1, 2], [3])]
    torch.testing.assert_close((3 * parts[0] + parts[1]) / 4, whole, rtol=1e-5, atol=1e-6)
    swapped = one(model, ids=torch.tensor([3, 2, 0, 1]), mmd_weight=0.0).denoise
    torch.testing.assert_close(swapped, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [32, 15, 33])
def test_any_size_comes_back_at_its_own_size(size):
    model = PHMDiff(small(), 1)
    levels = model.translate(torch.zeros(2, 1, size, size + 1), torch.arange(2))
    sides, expected = [tuple(x.shape[2:]) for x in levels], [(size, size + 1)]
    for _ in range(2):
        expected.append(tuple(-(-n // 2) for n in expected[-1]))
    assert sides == expected


def test_synthesis_does_not_depend_on_the_batch():
    model = PHMDiff(small(), 1).eval()
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    source, _ = images()
    whole = model.translate(source, torch.arange(4), steps=3, seed=5)[0]
    parts = torch.cat([model.translate(source[i : i + 1], torch.tensor([i]), steps=3, seed=5)[0] for i in range(4)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert not torch.equal(whole, model.translate(source, torch.arange(4), steps=3, seed=6)[0])


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_overfits_one_slice_and_gets_it_back(prediction):
    """The loss falls, masked and then unmasked, and 1-step (x0) and DDIM give the slice back."""
    torch.manual_seed(0)
    model = PHMDiff(small(prediction=prediction, complexity_gain=0.0), 1)
    config = TrainConfig(last_t_share=0.5 if prediction == "x0" else 0.0, mmd_weight=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    source, target = (x[:1].expand(8, -1, -1, -1) for x in images())
    ids, curve, total = torch.arange(8), [], 260
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / total)
        terms = model.loss(target, source, ids, (0, step), config, masked=step < total // 2)
        optimizer.zero_grad()
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(float(terms.denoise[0]))
    first, last = sum(curve[:5]) / 5, sum(curve[-20:]) / 20
    assert last < 0.1 * first if prediction == "x0" else last < 0.35 * first

    def psnr(steps):
        made = model.translate(source[:1], torch.tensor([77]), steps=steps, seed=9)[0]
        return float(10 * torch.log10(4 / (made - target[:1]).square().mean()))

    if prediction == "x0":
        assert psnr(1) > 26
    assert psnr(10) > (26 if prediction == "x0" else 15)


def test_the_coarser_estimate_is_detached():
    """With the finest level alone in the loss nothing of the coarser levels' own layers learns."""
    levels = [LevelSpec(mask_ratio=0.5, weight=w) for w in (1.0, 0.0, 0.0)]
    torch.manual_seed(0)
    model = PHMDiff(small(levels=levels, stem=False), 1)
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    one(model, mmd_weight=0.0).total.backward()
    assert model.net.final_layer[0].weight.grad.abs().sum() > 0
    assert all(model.net.final_layer[n].weight.grad.abs().sum() == 0 for n in (1, 2))


def test_the_scaled_state_keeps_the_noise_out_at_high_t():
    for scaled in (True, False):
        torch.manual_seed(0)
        model = PHMDiff(small(scale_state=scaled), 1).eval()
        for p in model.parameters():
            if p.abs().sum() == 0:
                torch.nn.init.normal_(p, std=0.05)
        source, _ = images()
        made = [model.translate(source, torch.arange(4), seed=seed)[0] for seed in (1, 2)]
        difference = float((made[0] - made[1]).abs().mean())
        assert (difference < 1e-2) == scaled, difference


def awake(**more) -> PHMDiff:
    """A small model whose zero-initialised parts do something."""
    torch.manual_seed(0)
    model = PHMDiff(small(**more), 1)
    for p in model.parameters():
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return model


def spied(model) -> list[dict]:
    """Record what the network gets at each level of every call."""
    calls, forward = [], model.net.forward_levels

    def recorded(inputs, vectors):
        calls.extend(vars(at) | {"together": len(inputs)} for at in inputs)
        return forward(inputs, vectors)

    model.net.forward_levels = recorded
    return calls


OPTIONS = {
    "v": dict(prediction="v"),
    "eps": dict(prediction="eps"),
    "variance": dict(learn_variance=True),
    "variance without head": dict(learn_variance=True, head=False, prediction="eps"),
    "teacher": dict(coarse="teacher"),
    "cascade": dict(coupling="cascade"),
    "teacher cascade": dict(coarse="teacher", coupling="cascade", prediction="v"),
    "diffmae": dict(reading="diffmae"),
    "diffmae without stem": dict(reading="diffmae", stem=False, head=False),
    "cosine": dict(schedule="cosine"),
    "background": dict(drop_background=True),
    "token": dict(decoder_input="token", prediction="v"),
    "residual": dict(residual=True),
    "pyramid cascade": dict(head_kind="pyramid", coupling="cascade"),
    "pyramid teacher": dict(head_kind="pyramid", coarse="teacher"),
    "pyramid head without stem": dict(head_kind="pyramid", stem=False),
    "pyramid head": dict(head_kind="pyramid", stem_to_tokens=False),
    "convolutions": dict(denoiser="convolutions", residual=True),
    "no masking": dict(levels=[LevelSpec(mask_ratio=0) for _ in range(3)]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_and_samples(name):
    """Every parameter gets a finite gradient (masked and unmasked together), and sampling gives an image."""
    model = awake(**OPTIONS[name])
    source, target = images()
    foreground = source > 0
    for masked in (True, False):
        config = TrainConfig(last_t_share=0.0, min_snr=5.0 if name == "v" else 0.0)
        terms = model.loss(target, source, torch.arange(4), (0, 3), config, masked=masked, foreground=foreground)
        terms.total.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()}
    # Without masks nobody enters the decoder as a noisy patch of his own.
    assert silent == {n for n, _ in model.named_parameters() if name == "no masking" and "decoder_embedder" in n}
    for sampler in ("ddim", "ddpm"):
        made = model.eval().translate(source, torch.arange(4), SampleConfig(steps=3, sampler=sampler, coarse_t=20))
        assert [m.shape[-1] for m in made] == [32, 16, 8]
        assert all(torch.isfinite(m).all() and float(m.abs().max()) <= 1 for m in made)


def test_min_snr_weighs_the_loss_of_a_sample():
    torch.manual_seed(0)
    model = PHMDiff(small(), 1)  # its output is 0: the loss is the mean square of the target
    terms = one(model, masked=False, mmd_weight=0.0, last_t_share=0.0, min_snr=5.0)
    abar = model.schedule(model.schedule.draw(torch.arange(4), (0, 3)))
    weight = (abar / (1 - abar)).clamp_max(5.0)
    _, target = images()
    torch.testing.assert_close(terms.denoise[0], (weight * target.square().mean((1, 2, 3))).mean())


def test_learned_variance_adds_the_bound_and_leaves_the_prediction_alone():
    model = awake(learn_variance=True)
    with torch.no_grad():  # the variance's half of the output alone
        for head in model.net.heads:
            head.last.weight[1:] = 0
            head.last.bias[1:] = 0.4
    terms = one(model, mmd_weight=0.0, last_t_share=0.0, vlb_weight=0.01)
    torch.testing.assert_close(terms.total.detach(), terms.denoise.mean() + 0.01 * 1000 * terms.vlb.mean())
    plain = one(model, mmd_weight=0.0, last_t_share=0.0, vlb_weight=0.0)
    torch.testing.assert_close(plain.total.detach(), plain.denoise.mean())
    assert (terms.vlb > 0).all()


def test_a_teacher_shows_the_true_coarse_image_with_noise_that_the_network_is_told():
    model = awake(coarse="teacher", coarse_noise=400)
    calls = spied(model)
    one(model, mmd_weight=0.0)
    ids = torch.arange(4)
    told = (_philox.integers(ids, 1, rng=(0, 3), stream=17)[:, 0] * 400) >> 32
    _, target = images()
    true_coarse = torch.nn.functional.avg_pool2d(target, 2)
    eps = _philox.normals(ids, 256, rng=(0, 3), stream=18).view_as(true_coarse)
    assert [(call["level"], call["together"]) for call in calls] == [(0, 3), (1, 3), (2, 3)]  # one pass for all levels
    torch.testing.assert_close(calls[0]["coarse"], noised(true_coarse, eps, model.schedule(told)))
    # The told noise level changes the conditioning of all levels but the coarsest.
    t = torch.full((4,), 300)
    quiet, loud = (model.net.modulations(t, torch.full((4,), s)) for s in (0, 200))
    differs = [any(not torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(quiet, loud, strict=True)]
    assert differs == [True, True, False]


def test_coarse_t_puts_noise_on_the_coarser_estimate_while_sampling():
    model = awake(coarse="teacher").eval()
    calls = spied(model)
    source, _ = images()
    for coarse_t in (0, 200):
        model.translate(source, torch.arange(4), SampleConfig(coarse_t=coarse_t))
    clean, noisy = calls[2]["coarse"], calls[5]["coarse"]
    eps = _philox.normals(torch.arange(4), 256, rng=(0, 0), stream=18).view_as(clean)
    # Level 1's own estimate saw another coarse image, so only the noise itself is compared.
    apart = noisy - model.schedule.abar[200].sqrt() * clean
    assert float((apart * eps).mean() / eps.square().mean()) == pytest.approx(
        float((1 - model.schedule.abar[200]).sqrt()), abs=0.05
    )


def test_cascade_draws_a_time_for_each_level_and_finishes_the_coarse_one_first():
    order = {}
    for coupling in ("lockstep", "cascade"):
        model = awake(coupling=coupling)
        calls = spied(model)
        one(model, mmd_weight=0.0, last_t_share=0.0)
        same = all(torch.equal(calls[0]["abar"], call["abar"]) for call in calls)
        assert same == (coupling == "lockstep")
        calls.clear()
        made = model.eval().translate(images()[0], torch.arange(4), steps=2)
        order[coupling] = [call["level"] for call in calls]
        if coupling == "cascade":  # the finer level is given the finished coarse image, at every step
            assert all(torch.equal(call["coarse"], made[1]) for call in calls if call["level"] == 0)
    assert order == {"lockstep": [2, 1, 0, 2, 1, 0], "cascade": [2, 2, 1, 1, 0, 0]}


def test_diffmae_encodes_clean_source_patches_and_denoises_every_target_patch():
    model = awake(reading="diffmae")
    tokens = []
    model.net.to_decoder.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    source, target = images()
    for seed in (0, 1):  # other noise; the mask of seed 0, so that the same patches are encoded
        with torch.no_grad():
            mask = model._mask(0, 64, torch.arange(4), (0, 3), None)
            eps = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
            abar = torch.full((4,), 0.5)
            coarse = torch.zeros(4, 1, 16, 16)
            vectors = model.net.modulations(torch.full((4,), 500))
            maps = model.net.source_maps(source)
            at = model.at_level(0, target, source, coarse, abar, maps, eps=eps, mask=mask)
            tokens.append(model.net.forward_levels([at], vectors[0])[0])
    assert tokens[0].shape[1] == 16  # 64 patches less 75 %
    assert torch.equal(tokens[0], tokens[2])  # the encoder never sees the noisy target
    patches = (tokens[1] - tokens[3]).abs().unfold(2, 4, 4).unfold(3, 4, 4).amax((1, 4, 5))
    assert (patches > 0).all()  # every target patch is denoised from its own noise


def test_background_is_masked_first():
    model = awake(drop_background=True)
    calls = spied(model)
    source, target = images()
    foreground = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    foreground[:, :, 8:24, 8:24] = True  # 16 of 64 patches, as many as stay
    model.loss(target, source, torch.arange(4), (0, 3), TrainConfig(), masked=True, foreground=foreground)
    kept = calls[-1]["mask"][0]
    inside = [row * 8 + col for row in range(2, 6) for col in range(2, 6)]
    assert kept.tolist() == [inside] * 4
    calls.clear()
    model.loss(target, source, torch.arange(4), (0, 3), TrainConfig(), masked=True)
    assert calls[-1]["mask"][0].tolist() != [inside] * 4


def test_preset_paper_is_the_papers():
    config = build_config("paper")
    m, t = config.model, config.train
    assert (m.prediction, m.stem, m.head, m.scale_state) == ("eps", False, False, False)
    assert (t.lr, t.batch_size, t.weight_decay, t.mmd_weight, t.mmd_kernel) == (1e-6, 10, 0, 0.5, "paper")
    assert (t.betas, t.min_lr_ratio, t.warmup_steps, t.last_t_share) == ((0.9, 0.999), 1, 0, 0)


def test_every_step_of_ddpm_draws_noise_of_its_own(monkeypatch):
    model, drawn = awake().eval(), []
    real = _philox.normals

    def normals(sample_ids, num, *, rng, stream):
        drawn.append((rng, stream))
        return real(sample_ids, num, rng=rng, stream=stream)

    monkeypatch.setattr(_philox, "normals", normals)
    model.translate(images()[0], torch.arange(4), SampleConfig(steps=3, sampler="ddpm", seed=7))
    # The start and two steps (the last adds none), for each of the three levels.
    assert drawn == [((7, step), 1 + level) for step in range(3) for level in range(3)]


def test_ssim_weight_adds_what_is_missing_of_the_structure():
    levels = [LevelSpec(mask_ratio=0.5, weight=w) for w in (3.0, 1.0, 0.0)]
    torch.manual_seed(0)
    model = PHMDiff(small(levels=levels), 1)  # its output is 0
    plain, more = (one(model, mmd_weight=0.0, ssim_weight=w) for w in (0.0, 0.2))
    _, y = images()
    for level in range(2):
        lacking = 1 - losses.similarity(torch.zeros_like(y), y).mean()
        torch.testing.assert_close(more.denoise[level] - plain.denoise[level], 0.2 * lacking)
        y = torch.nn.functional.avg_pool2d(y, 2)
    assert plain.denoise[2] == more.denoise[2]  # 8 x 8 is smaller than the window
    torch.testing.assert_close(more.total.detach(), (3 * more.denoise[0] + more.denoise[1]) / 4)


def test_residual_starts_from_the_coarser_estimate():
    """An untrained network adds nothing: a level is the upsampled coarser one, the coarsest 0."""
    torch.manual_seed(0)
    for plain in (dict(), dict(denoiser="convolutions"), dict(head=False)):
        model = PHMDiff(small(residual=True, **plain), 1)
        given = torch.rand(4, 1, 16, 16)
        maps = model.net.source_maps(images()[0])
        at = model.at_level(0, images()[1], images()[0], given, torch.full((4,), 0.3), maps,
                       eps=torch.randn(4, 1, 32, 32))  # fmt: skip
        out = model.net.forward_levels([at], model.net.modulations(torch.full((4,), 500))[0])[0]
        torch.testing.assert_close(out, torch.nn.functional.interpolate(given, scale_factor=2, mode="bilinear"))


def test_two_views_are_the_mean_with_the_mirrored_one_mirrored_back():
    model = awake().eval()
    source, _ = images()
    source, ids = source[..., :31, :29], torch.arange(4)  # odd sides: what is padded lies at one end
    alone, mirrored = model.translate(source, ids), model.translate(source.flip(2), ids)
    for both, a, b in zip(model.translate(source, ids, SampleConfig(views=2)), alone, mirrored, strict=True):
        torch.testing.assert_close(both, (a + b.flip(2)) / 2)
        assert not torch.allclose(a, b.flip(2))


def test_detail_is_of_the_mean_at_the_finest_level_alone():
    model = awake().eval()
    source, ids = images()[0][..., :31, :29], torch.arange(4)
    plain = model.translate(source, ids, SampleConfig(views=2))
    sharper = model.translate(source, ids, SampleConfig(views=2, detail=1.5))
    torch.testing.assert_close(sharper[0], with_detail(plain[0], 1.5))
    assert not torch.allclose(sharper[0], plain[0])
    for a, b in zip(sharper[1:], plain[1:], strict=True):
        assert torch.equal(a, b)


def test_the_convolutional_denoiser_does_not_see_masked_patches():
    model = awake(denoiser="convolutions", levels=[LevelSpec(mask_ratio=0.5)] * 2)
    source, target = images()
    mask = model._mask(0, 64, torch.arange(4), (0, 3), None)
    hidden = ~losses.visible_pixels(mask[1], 4, 32, 32)
    vectors, abar = model.net.modulations(torch.full((4,), 500))[0], torch.full((4,), 0.5)

    def made(y):
        at = model.at_level(0, y, source, None, abar, None, eps=torch.zeros_like(y), mask=mask)
        return model.net.forward_levels([at], vectors)[0]

    assert torch.equal(made(target), made(torch.where(hidden, 0.5, target)))
    assert not torch.equal(made(target), made(torch.where(hidden, target, 0.5)))


@pytest.mark.parametrize("name", ["y", "eps", "sources", "coarse", "abar", "t"])
def test_every_input_matters_to_the_convolutional_denoiser(name):
    model = awake(denoiser="convolutions", scale_state=False)
    source, target = images()
    given = dict(y=target, sources=source, coarse=torch.rand(4, 1, 16, 16), abar=torch.full((4,), 0.5),
                 eps=torch.randn(4, 1, 32, 32), t=torch.full((4,), 500))  # fmt: skip

    def made(y, sources, coarse, abar, eps, t):
        at = model.at_level(0, y, sources, coarse, abar, None, eps=eps)
        return model.net.forward_levels([at], model.net.modulations(t)[0])[0]

    changed = given[name] + 100 if name == "t" else given[name] * 0.7 + 0.1
    assert not torch.allclose(made(**given), made(**given | {name: changed}))
