"""
The exercises: the one list that make.py, check.py and grade.py read. It never leaves this folder.

A wrong answer is a change to the right one: (function, old, new, what the student is told). make.py
computes what it returns and ships these numbers, so that check.py recognises it by its output. A variant
replaces fields of its exercise; `edits` are the changes that make the real code its solution. Pieces of
code here must be in the live source exactly once; tests/test_course.py says which one no longer is.

The checks of an exercise are the function with its name in a check_*.py (make.py says which), its picture
the one in draw.py.
"""

from typing import NamedTuple

from configurator import require


class Exercise(NamedTuple):
    name: str
    title: str
    file: str
    functions: tuple  # to be written
    points: int
    minutes: int
    paper: str
    task: str
    hint: str
    picture: str  # what is to be seen on it
    wrong: list  # (function, old, new, what the student is told)
    twins: tuple = ()  # (file, function) elsewhere that holds the same formula: blanked too
    edits: tuple = ()  # (function, old, new): from the real code to the hand-out's, docstrings among them
    options: dict = {}  # of the checks
    variants: tuple = ()  # fields that differ: --variant=1 takes the first, and so on
    number: str = ""  # such as A3


SET_A = [
    Exercise(
        "gumbel_softmax", "Gumbel-Softmax", "model", ("gumbel_softmax",), 6, 30,
        "DisCo-Diff App. D.2; Jang et al. 2016",
        """A categorical sample has no gradient. Write its relaxation: noise joins the logits, a softmax at
        temperature tau takes the place of the argmax.""",
        "The temperature divides the sum of logits and noise.",
        "samples on the triangle of three categories, for three temperatures: they move to the corners as tau falls",
        [("gumbel_softmax", "(logits + gumbel) / tau", "logits / tau",
          "your output equals the softmax of the logits alone: the noise is missing, so nothing is sampled"),
         ("gumbel_softmax", "(logits + gumbel) / tau", "(logits / tau + gumbel)",
          "your output divides only the logits by tau: the noise must be divided too"),
         ("gumbel_softmax", "(logits + gumbel) / tau", "(logits + gumbel) * tau",
          "your output multiplies by tau: a small tau must make it sharper"),
         ("gumbel_softmax", "dim=-1", "dim=-2",
          "your output sums to 1 over the wrong axis: the categories are the last one")]),
    Exercise(
        "mixture", "The exact denoiser of a mixture", "toy_measures", ("log_density", "exact_denoiser"), 10, 75,
        "EDM sec. 2; DisCo-Diff App. F",
        """For a mixture of Gaussians everything is known. Write its log-densities, then its denoiser, the
        expected clean point. The score is (D - x) / t^2: the checks compare it with the gradient of the
        density. `exact_denoiser` returns a function denoise(x, t).""",
        """Noise of standard deviation t turns N(c, std^2) into N(c, std^2 + t^2). Take the weights of the
        components by a softmax of log-densities: densities underflow.""",
        "noisy points, and the dots where your denoiser sends them, at two noise levels",
        [("exact_denoiser", "(std ** 2 + t ** 2) ** 0.5, 0)", "std, 0)",
          "your weights are those of the clean mixture: the noise widens every component"),
         ("exact_denoiser", "std ** 2 * x + t ** 2 * w @ centres", "t ** 2 * x + std ** 2 * w @ centres",
          "your output has x and centre exchanged: at high noise the centre counts, at low noise x"),
         ("exact_denoiser", "(std ** 2 * x + t ** 2 * w @ centres) / (std ** 2 + t ** 2)", "w @ centres",
          "your output is the mean of the centres: std is not 0, so the noisy point tells something too"),
         ("exact_denoiser", ".softmax(1)", ".exp() / log_density(x, centres, (std ** 2 + t ** 2) ** 0.5, 0)"
          ".exp().sum(1, keepdim=True)", "your weights underflow far from the centres: use a softmax"),
         ("log_density", "/ (2 * variance)", "/ variance",
          "your log-densities lack the 1/2 of the Gaussian's exponent")],
        edits=(("exact_denoiser", """N(c_j, (std^2 + t^2) I). x is from component j with
    probability w_j, and then the expected clean point is (std^2 x + t^2 c_j) / (std^2 + t^2).
""", """N(c_j, (std^2 + t^2) I).
"""),)),
    Exercise(
        "heun", "Noise levels and Heun's step", "diffusion", ("noise_levels", "heun_step"), 12, 90,
        "EDM Eqs. 3 and 5, Alg. 2; DisCo-Diff Alg. 3, lines 7-15",
        """Write the sampler's noise levels and one step between two of them. `heun` below calls both. A step
        with gamma > 0 first adds noise (churn). The step to t_next = 0 is plain Euler. The checks measure the
        order of the error: halving the steps must quarter it.""",
        "Both slopes multiply the same step, from t_hat to t_next. Only the raised level t_hat leaves x noisier.",
        "the error against the number of steps, with lines of order 1 and 2",
        [("heun_step", "(d + d_next) / 2", "d", "your output equals plain Euler: the correction is missing"),
         ("heun_step", "(d + d_next) / 2", "d_next",
          "your output uses the slope at the end alone: take the mean of both slopes"),
         ("heun_step", "d_next = (x_next - denoise(x_next", "d_next = (x - denoise(x",
          "your second slope is taken at the old x: take it where Euler's step leads"),
         ("heun_step", "(t_hat ** 2 - t ** 2).sqrt()", "(t_hat - t)",
          "your churn adds standard deviations: variances add"),
         ("heun_step", "x + (t_next - t_hat) * (d + d_next)", "x + (t_next - t) * (d + d_next)",
          "your step starts at t: with churn it starts at t_hat"),
         ("noise_levels", "sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))",
          "(sigma_max + i * (sigma_min - sigma_max)) ** (1 / rho)",
          "your noise levels are evenly spaced: their rho-th roots should be"),
         ("noise_levels", "/ max(num_steps - 1, 1)", "/ num_steps",
          "your last noise level is not sigma_min: there are num_steps - 1 gaps")],
        twins=(("diffusion", "restart"), ("diffusion", "flow")),
        variants=(
            dict(title="Noise levels and the midpoint rule", options={"alpha": 0.5},
                 task="""Write the sampler's noise levels, and one step by the midpoint rule in place of Heun's
                 method: a half step of Euler, then the whole step with the slope found there. A step with
                 gamma > 0 first adds noise (churn). The step to t_next = 0 is plain Euler. The checks measure
                 the order of the error: halving the steps must quarter it.""",
                 hint="The midpoint has the noise level (t_hat + t_next) / 2. Both slopes start from x.",
                 edits=(("heun_step", "(EDM Alg. 2, lines 4-11)", "(as EDM Alg. 2, but by the midpoint rule)"),
                        ("heun_step", "d_next = (x_next - denoise(x_next, t_next.double())) / t_next",
                         "t_half, x_half = (t_hat + t_next) / 2, (x + x_next) / 2\n"
                         "        d_half = (x_half - denoise(x_half, t_half.double())) / t_half"),
                        ("heun_step", "(d + d_next) / 2", "d_half"))),
            dict(title="Noise levels and Ralston's step", options={"alpha": 2 / 3},
                 task="""Write the sampler's noise levels, and one step by Ralston's method in place of Heun's:
                 Euler over two thirds of the step, then the whole step with a quarter of the first slope and
                 three quarters of the second. A step with gamma > 0 first adds noise (churn). The step to
                 t_next = 0 is plain Euler. The checks measure the order of the error: halving the steps must
                 quarter it.""",
                 hint="The second slope is taken at t_hat + 2/3 (t_next - t_hat). Both slopes start from x.",
                 edits=(("heun_step", "(EDM Alg. 2, lines 4-11)", "(as EDM Alg. 2, but by Ralston's method)"),
                        ("heun_step", "d_next = (x_next - denoise(x_next, t_next.double())) / t_next",
                         "t_part = t_hat + (t_next - t_hat) * 2 / 3\n        x_part = x + (t_part - t_hat) * d\n"
                         "        d_part = (x_part - denoise(x_part, t_part.double())) / t_part"),
                        ("heun_step", "(d + d_next) / 2", "(d + 3 * d_part) / 4"))))),
    Exercise(
        "precondition", "EDM's preconditioning", "diffusion", ("edm_constants",), 8, 60, "EDM Eq. 7, Table 1, App. B.6",
        """The network F never sees x itself. A denoiser is D = c_skip x + c_out F(c_in x; c_noise). Choose the constants
        such that F's input and F's target have variance 1 at every noise level, and c_skip x is the best guess without
        F. c_noise is ln(sigma) / 4. The checks measure these variances: question A-1 derives the formulas.""",
        "x = y + sigma n, whose parts have the variances sigma_data^2 and sigma^2: what is the variance of x?",
        "c_skip, c_out and c_in of your function against the noise level",
        [("edm_constants", "sigma_data ** 2 / variance", "sigma ** 2 / variance",
          "your c_skip grows with the noise: at low noise x is the answer, so c_skip is 1 there"),
         ("edm_constants", "sigma * sigma_data / variance.sqrt()", "sigma * sigma_data / variance",
          "your c_out lacks a square root: F's target does not have variance 1"),
         ("edm_constants", "1 / variance.sqrt()", "sigma / sigma",
          "your network sees x unscaled: c_in is 1"),
         ("edm_constants", "1 / variance.sqrt()", "1 / (sigma ** 2 + 1).sqrt()",
          "your c_in takes the data's variance as 1: it is sigma_data^2"),
         ("edm_constants", "sigma.log() / 4", "sigma",
          "your network is told sigma: it should be told ln(sigma) / 4")],
        twins=(("coarse", "CoarseDenoiser.forward"), ("toy2d", "Denoiser.forward")),
        variants=(dict(
            task="""The network F never sees x itself. A denoiser is D = c_skip x + c_out F(c_in x; c_noise). Choose the
            constants such that F's input and F's target have variance 1 at every noise level, and c_skip x is the best
            guess without F. Measure the noise in units of the data: c_noise is ln(sigma / sigma_data) / 4. The checks
            measure these variances: question A-1 derives the formulas.""", options={"relative": True},
            edits=(("edm_constants", "EDM, Table 1:", "EDM, Table 1, but c_noise = ln(sigma / sigma_data) / 4:"),
                   ("edm_constants", "sigma.log() / 4", "(sigma / sigma_data).log() / 4"))),)),
    Exercise(
        "forward", "Encoder and denoiser together", "model", ("DisCoDiff.forward",), 10, 75,
        "DisCo-Diff Alg. 1, lines 5-7",
        """Write the forward pass of stage 1: the encoder reads the clean images, its relaxed codes condition the
        denoiser of the noisy ones. The loss of the denoiser must reach the encoder. Where `drop` is True, the
        codes are replaced by the null embedding. Without latents (num_latents = 0) there is no encoder.""",
        "`gumbel_softmax`, `condition` and `denoise` are there to be called. Read toy2d.py's `train` first.",
        "the norm of the gradient that reaches the encoder, against the temperature",
        [("DisCoDiff.forward", "self.encoder(y if images is None else images)", "self.encoder(y + noise)",
          "your encoder reads the noisy images: it should read the clean ones"),
         ("DisCoDiff.forward", "gumbel_softmax(logits, tau, gumbel)", "draw_codes(logits, gumbel)",
          "your codes are hard: no gradient reaches the encoder"),
         ("DisCoDiff.forward", "gumbel_softmax(logits, tau, gumbel)", "gumbel_softmax(logits, 1.0, gumbel)",
          "your codes ignore tau"),
         ("DisCoDiff.forward", "self.condition(z, drop)", "self.condition(z)",
          "your codes are never dropped: hand `drop` on"),
         ("DisCoDiff.forward", "self.denoise(y + noise", "self.denoise(y + sigma.reshape(-1, 1, 1, 1) * noise",
          "your noise is scaled twice: `noise` is scaled by sigma already")],
        twins=(("coarse", "CoarseDenoiser.forward"),),
        variants=(dict(
            task="""Write the forward pass of stage 1: the encoder reads the clean images, its relaxed codes
            condition the denoiser of the noisy ones. The loss of the denoiser must reach the encoder. Codes help
            at high noise, so here they act there alone: images with sigma < 1 always get the null embedding, as
            do those where `drop` is True. Without latents (num_latents = 0) there is no encoder.""",
            options={"lowest": 1.0},
            edits=(("DisCoDiff.forward", "infers z from the clean images y, and denoises y + noise with it.",
                    "infers z from the clean images y, and denoises y + noise with it.\n"
                    "        Here images with sigma < 1 get the null embedding."),
                   ("DisCoDiff.forward", "self.condition(z, drop)",
                    "self.condition(z, sigma < 1 if drop is None else drop | (sigma < 1))"))),)),
    Exercise(
        "guidance", "Guidance by the latents", "diffusion", ("guided",), 6, 30, "DisCo-Diff App. B",
        """Write the guided denoiser D~ = w D(z) + (1 - w) D(null). `guided` returns a function of x and sigma, which
        calls `denoise` once, with 2B images: first those with codes, then those with null latents.""",
        "Concatenate x with itself; `chunk` takes the result apart.",
        "samples of a mixture of eight modes, guided to three of them, for w = 1, 2 and 4 (once A2 and A3 are solved)",
        [("guided", "w * D + (1 - w) * D_null", "(1 + w) * D - w * D_null",
          "your w is Table 3's cfg, which is w - 1: w = 1 must be no guidance"),
         ("guided", "D, D_null = ", "D_null, D = ",
          "you took the halves in the wrong order: the images with codes come first"),
         ("guided", "w * D + (1 - w) * D_null", "w * D",
          "your output lacks the null part"),
         ("guided", "torch.cat([x, x])", "x.repeat_interleave(2, 0)",
          "your 2B images are interleaved: all images first, then all once more")],
        variants=(dict(
            title="Guidance in an interval", options={"interval": (0.3, 5.0)}, paper="DisCo-Diff App. B; "
            "Kynkaanniemi et al. 2024",
            task="""Write the guided denoiser D~ = w D(z) + (1 - w) D(null), with guidance where it helps: at
            0.3 < sigma <= 5. At other noise levels the result is D(z). `guided` returns a function of x and
            sigma, which calls `denoise` once, with 2B images: first those with codes, then those with null
            latents.""",
            edits=(("guided", "w = 1 is no guidance.", "w = 1 is no guidance. Here w acts at 0.3 < sigma <= 5 alone."),
                   ("guided", "w * D + (1 - w) * D_null", "w * D + (1 - w) * D_null if 0.3 < sigma <= 5 else D"))),)),
    Exercise(
        "curvature", "Curvature of trajectories", "diffusion", ("curvature",), 8, 60, "DisCo-Diff App. F.3, Fig. 4",
        """How straight does a model sample? Write the curvature of its trajectories by two unit tangents, one
        Euler step apart. On a circle it must be 1 / radius, whatever the speed.""",
        "Flatten all axes but the first before you take lengths: an image is one point.",
        "curvature against the noise level: of one Gaussian, and of eight (once A2 and A3 are solved)",
        [("curvature", "(normalize(drift) - normalize(drift_next))", "(drift - drift_next)",
          "your tangents are not unit vectors: the speed must make no difference"),
         ("curvature", "/ (drift * dt).norm(dim=1)", "/ dt",
          "you divide by the time dt: divide by the length of the way"),
         ("curvature", "(x_next - denoise(x_next, t - dt))", "(x - denoise(x, t - dt))",
          "your second slope is taken at the old x"),
         ("curvature", "x - drift * dt", "x + drift * dt",
          "your step goes the wrong way: from t to t - dt, x moves against dx/dt")],
        variants=(dict(
            options={"sign": 1},
            task="""How straight does a model sample? Write the curvature of its trajectories by two unit tangents,
            one Euler step apart, here a step *up*, from t to t + dt. On a circle it must be 1 / radius, whatever
            the speed.""",
            edits=(("curvature", "|T(t) - T(t - dt)| / |x(t) - x(t - dt)|", "|T(t) - T(t + dt)| / |x(t) - x(t + dt)|"),
                   ("curvature", "from t to t - dt, which must be positive.", "from t to t + dt."),
                   ("curvature", "x - drift * dt", "x + drift * dt"),
                   ("curvature", "denoise(x_next, t - dt)) / (t - dt)", "denoise(x_next, t + dt)) / (t + dt)"))),)),
]

SET_B = [
    Exercise(
        "prior", "An autoregressive prior", "prior", ("Prior.forward", "Prior.loss"), 8, 50,
        "DisCo-Diff Eq. 4, Alg. 2, App. D.1",
        """Write the prior p(z | c) = prod_i p(z_i | z_<i, c) and its loss. The first token is the class; row i of
        the logits sees the class and the codes before i. The blocks are causal. The checks change one code and
        see which rows move, and add up the probabilities of all codes.""",
        "Shift the codes by one: the class takes the first place, the last code is never read.",
        "which code moves which row of the logits: row i has dots at the codes before i",
        [("Prior.forward", "self.embed(codes[:, :-1])", "self.embed(codes[:, 1:])",
          "your row i sees code i itself: shift the codes the other way"),
         ("Prior.forward", "dim=1) + self.position", "dim=1)", "your tokens lack their positions"),
         ("Prior.forward", "self.first_token(labels, len(codes))", "self.first_token(None, len(codes))",
          "your first token ignores the class"),
         ("Prior.loss", ".sum(1)", ".mean(1)",
          "your loss is a mean over positions: -ln p of all codes is their sum")],
        variants=(dict(
            title="An autoregressive prior, last code first",
            task="""Write the prior p(z | c) = prod_i p(z_i | z_>i, c) and its loss: the *last* code comes first.
            The first token is the class; row i of the logits sees the class and the codes after i. The blocks are
            causal, so turn the codes round before them and the logits after them; position 0 belongs to the class
            token. The checks change one code and see which rows move, and add up the probabilities of all
            codes.""",
            hint="`flip(1)` turns the codes round. Then shift them by one: the class takes the first place.",
            picture="which code moves which row of the logits: row i has dots at the codes after i",
            options={"reverse": True},
            edits=(("Prior.forward", "row i sees only the codes before i", "row i sees only the codes after i"),
                   ("Prior.forward", "self.embed(codes[:, :-1])", "self.embed(codes.flip(1)[:, :-1])"),
                   ("Prior.forward", "return float32(self.head, self.norm(x))",
                    "return float32(self.head, self.norm(x)).flip(1)"))),)),
    Exercise(
        "sampling", "Sampling it, with a cache", "prior", ("Prior.sample",), 12, 100, "DisCo-Diff Alg. 3, lines 3-5",
        """Draw codes one after another. First the plain way: call the network m times and use one row of its
        logits each time. Then with a key-value cache: each token passes through the blocks once. A block takes
        the list `cache` and appends to it (TransformerBlock.attention). noise.gumbel(m, k) decides every draw;
        the temperature divides the logits, and 0 takes the mode. The plain way earns all points but the
        last property's.""",
        "Dividing the logits by T is the same as multiplying the noise by T, and the latter works for T = 0.",
        "how often each of 64 codes is drawn, against its probability",
        [("Prior.sample", "temperature * gumbel[:, i]", "gumbel[:, i]", "your draws ignore the temperature"),
         ("Prior.sample", "temperature * gumbel[:, i]", "0 * gumbel[:, i]",
          "your codes are the most likely ones: the noise is missing"),
         ("Prior.sample", "block(x, cache)", "block(x)",
          "your network sees the newest token alone: what came before is lost"),
         ("Prior.sample", "self.embed(codes[-1])", "self.embed(codes[0])",
          "your network is shown the first code again and again: it should get the newest"),
         ("Prior.sample", "x + self.position[i]", "x + self.position[0]",
          "your tokens all have the position 0")],
        edits=(("Prior.sample", """With a key-value cache, this equals
        the plain loop

            codes = zeros(B, m)
            for i in range(m):
                codes[:, i] = draw_codes(self(codes, labels)[:, i] / temperature, gumbel[:, i])
""", """With a key-value cache, every
        token passes through the blocks once.
"""),),
        variants=(dict(
            title="Sampling it, last code first, with a cache", options={"reverse": True},
            task="""Draw codes one after another, the *last* one first, as the prior wants it. First the plain way:
            call the network m times and use one row of its logits each time. Then with a key-value cache: each
            token passes through the blocks once. A block takes the list `cache` and appends to it
            (TransformerBlock.attention). noise.gumbel(m, k) decides every draw, its row i that of code i; the
            temperature divides the logits, and 0 takes the mode. The plain way earns all points but the last
            property's.""",
            edits=(("Prior.sample", """With a key-value cache, this equals
        the plain loop

            codes = zeros(B, m)
            for i in range(m):
                codes[:, i] = draw_codes(self(codes, labels)[:, i] / temperature, gumbel[:, i])
""", """The last code is drawn first.
        With a key-value cache, every token passes through the blocks once.
"""),
                   ("Prior.sample", "unless these come last", "unless these come first"),
                   ("Prior.sample", "require_prefix(given >= 0)", "require_prefix((given >= 0).flip(1))"),
                   ("Prior.sample", "torch.where(given[:, i] < 0, drawn, given[:, i])",
                    "torch.where(given[:, -1 - i] < 0, drawn, given[:, -1 - i])"),
                   ("Prior.sample", "temperature * gumbel[:, i]", "temperature * gumbel[:, -1 - i]"),
                   ("Prior.sample", "torch.stack(codes, dim=1)", "torch.stack(codes[::-1], dim=1)"))),)),
    Exercise(
        "entropy", "Masks and score entropy", "sedd", ("absorb", "score_entropy"), 10, 75,
        "DLC sec. 4; Lou et al. 2024, secs. 3.2, 3.3",
        """The forward process masks tokens, the loss compares scores. Write both. The entropy of a masked position is
        sum_y s_y - a ln s_x0 + K(a), where s are the scores, a = 1 / (e^sigma - 1) is the true score of x0's
        token, and K(a) makes the smallest value 0. Other positions count 0.""",
        "At sigma = 1e-3, e^sigma - 1 needs torch.expm1. Find K from the smallest value of s - a ln s.",
        "the entropy against the score of x0's token, for three noise levels: the minimum is 0, at a",
        [("absorb", "u < (1 - EPS)", "u > (1 - EPS)", "your masks are the wrong way round: none at t = 0"),
         ("score_entropy", " + a * (a.log() - 1)", "",
          "your entropy lacks its constant: it must be 0 for the right scores"),
         ("score_entropy", "torch.expm1(sigma)", "sigma",
          "your true score is 1 / sigma: it is 1 / (e^sigma - 1)"),
         ("score_entropy", "a * own", "own", "your term of x0's token lacks its weight a"),
         ("score_entropy", "torch.where(x == log_score.shape[2], entropy, 0)", "entropy",
          "you count positions that are not masked")]),
    Exercise(
        "step", "One step back in time", "sedd", ("step_probs", "analytic_probs"), 6, 45,
        "DLC sec. 4; Lou et al. 2024, sec. 4.2",
        """Write the probabilities of one step of SEDD's analytic sampler, from time t to s. A masked position
        becomes y with probability (e^Delta - 1) s_y, Delta = sigma(t) - sigma(s), and stays masked with the
        rest; other positions stay as they are. `step_probs` does this for any factor in place of e^Delta - 1.""",
        "The last column is the mask. `F.pad` adds a column, `F.one_hot` makes the rows that stay.",
        "what a mask at t = 0.9 has become at earlier times: the tokens' shares at s = 0 are their probabilities",
        [("analytic_probs", "torch.expm1(log_linear(t)[0] - log_linear(s)[0])",
          "(log_linear(t)[0] - log_linear(s)[0])", "your factor is Delta: it is e^Delta - 1"),
         ("step_probs", "log_score[..., :-1].exp()", "log_score[..., :-1].softmax(2)",
          "you normalise the scores: their sum says how likely a position is to stay masked"),
         ("step_probs", "1 - p.sum(2)", "0", "nothing stays masked in your step"),
         ("step_probs", "torch.where(x[..., None] == p.shape[2] - 1, p, F.one_hot(x, p.shape[2]).to(p.dtype))", "p",
          "your unmasked positions change: they must stay")],
        twins=(("sedd", "euler_probs"),)),
    Exercise(
        "hitting", "First-hitting", "sedd", ("first_hitting",), 8, 60, "Zheng et al. 2024; DLC sec. 4",
        """The exact sampler in m evaluations, however small the steps it replaces. Each token unmasks at a time of
        its own, uniform on (0, 1); the latest time comes first. At that time, draw the token in proportion to its
        scores. rand(m) gives a row of m times for each code, gumbel(V) the noise of one draw. The checks use exact
        scores of a known distribution, and a chi-square test.""",
        "Sort the times; the order is the positions in which tokens unmask. `draw_codes` draws from logits.",
        "how often each of 64 codes is drawn, against its probability",
        [("first_hitting", "x, rows = x.clone(), torch.arange", "rows = torch.arange",
          "you write into the x that was given: start from a copy"),
         ("first_hitting", "descending=True", "descending=False",
          "your times rise: the latest comes first, since time runs from 1 to 0"),
         ("first_hitting", "draw_codes(log_p, gumbel(log_p.shape[1]))", "log_p.argmax(1)",
          "you take the likeliest token: draw it"),
         ("first_hitting", "[rows, i, :-1]", "[rows, i]", "your draws include the mask: its column means nothing"),
         ("first_hitting", "for t, i in zip(times.T, order.T):\n        log_p = score(x, t)[rows",
          "scores = score(x, times[:, 0])\n    for t, i in zip(times.T, order.T):\n        log_p = scores[rows",
          "you evaluate the scores once: each token must see those before it")],
        twins=(("sedd", "SEDD.nats"),)),
    Exercise(
        "remasking", "Remasking", "sedd", ("tau_leaping",), 8, 60, "DLC Eq. 4, App. A; Wang et al. 2025",
        """A masked diffusion can't correct a token that it has drawn. Remasking lets it: at times t0 < t < t1 an
        unmasked token is masked again with probability eta, or with less if the schedule has no room for as many.
        The masked positions then take a longer step, so that the share of masks follows the schedule all the same.
        Write the sampler. eta = 0 is the plain one, and the last evaluation leaves no mask. The checks count masks
        after each step.""",
        """P(masked at t) = t. If the share a of the unmasked is masked again, the masked positions must go on to
        the time s - a (1 - t).""",
        "the share of masks along the time, with and without remasking: both on the diagonal",
        [("tau_leaping", "times(s - a * (1 - t))", "times(s)",
          "too many masks: those masked again come on top. The masked positions need a longer step"),
         ("tau_leaping", "if t0 < t < t1 else 0", "if t < t1 else 0", "your remasking goes on below t0"),
         ("tau_leaping", "p[unmasked] *= 1 - a", "pass",
          "your unmasked tokens keep all their probability: rows must sum to 1"),
         ("tau_leaping", "draw_codes(p.clamp_min(0).log(), gumbel(*p.shape[1:]))", "p.argmax(-1)",
          "you take the likeliest: draw")],
        variants=(dict(
            title="Remasking, rescaled", options={"rescale": True},
            task="""A masked diffusion can't correct a token that it has drawn. Remasking lets it: at times t0 < t < t1
            an unmasked token is masked again. The schedule has room for a probability of at most
            min(1, s / (1 - t)); take eta times that. The masked positions then take a longer step, so that the
            share of masks follows the schedule all the same. Write the sampler. eta = 0 is the plain one, and the
            last evaluation leaves no mask. The checks count masks after each step.""",
            edits=(("tau_leaping", "an unmasked token is masked again with probability eta, or less if the schedule has"
                    "\n    no room.",
                    "an unmasked token is masked again with probability eta min(1, s / (1 - t)), eta\n"
                    "    times the most that the schedule has room for."),
                   ("tau_leaping", "min(eta, s / (1 - t))", "eta * min(1, s / (1 - t))"))),)),
    Exercise(
        "frechet", "Frechet distance", "metrics", ("frechet_distance",), 8, 50, "Heusel et al. 2017, Eq. 6",
        """FID is the squared distance between two Gaussians. Write it, for covariances that may lack full rank.
        `factor` gives F with sigma = F F^T; the trace of the product's root follows from F1^T F2.""",
        "tr((sigma1 sigma2)^(1/2)) is the sum of the singular values of F1^T F2.",
        "the distance of two samples of one distribution, against the number of rows: its bias",
        [("frechet_distance", "((mu1 - mu2) ** 2).sum()", "abs(mu1 - mu2).sum()",
          "your means enter by their absolute difference: the distance is squared"),
         ("frechet_distance", "- 2 * trace", "- trace", "the trace of the root counts twice"),
         ("frechet_distance", "torch.linalg.svdvals(F1.T @ F2).sum().item()",
          "float(np.sqrt(np.diag(sigma1) * np.diag(sigma2)).sum())",
          "your root takes the diagonals alone: the covariances are matrices"),
         ("frechet_distance", "torch.linalg.svdvals(F1.T @ F2).sum()", "(F1.T @ F2).square().sum().sqrt()",
          "you add the squares of the singular values: add the values themselves")],
        edits=(("frechet_distance", """ With sigma = F F^T,
    the trace of the product's root is the sum of the singular values of F1^T F2: no root of a
    non-symmetric matrix is needed.
""", "\n"),),
        variants=(dict(
            name="kernel", title="Kernel distance", functions=("kernel_distance",), paper="Binkowski et al. 2018",
            edits=(),
            task="""KID compares two sets of features by a kernel, without bias. Write the estimate and its standard
            error, as the docstring says. The checks draw many small sets, whose mean must be the true value.""",
            hint="The kernel of a row with itself must not take part in the mean over its own side.",
            picture="the mean over many pairs of sets from one distribution, against the number of rows: around 0",
            wrong=[("kernel_distance", "(row_sums(x, x) - itself) / (len(x) - 1)", "row_sums(x, x) / len(x)",
                    "your estimate is biased: a row is compared with itself"),
                   ("kernel_distance", "part @ y.T / x.shape[1] + 1", "part @ y.T + 1",
                    "your kernel lacks the division by D"),
                   ("kernel_distance", "2 * math.sqrt(", "math.sqrt(",
                    "your standard error is half of what it should be"),
                   ("kernel_distance", "- row_sums(x, y) / len(y)", "- 2 * row_sums(x, y) / len(y)",
                    "the other side counts twice in each of your two means: once is enough")]),)),
]

SETS = {"A": SET_A, "B": SET_B}


def last_variant(which):
    return max(len(exercise.variants) for exercise in SETS[which])


def exercises(which, variant=0):
    """The exercises of set "A" or "B", each in this variant of it, or in the last that it has.

    Raises UserError for a variant that none has.
    """
    last = last_variant(which)
    require(0 <= variant <= last, f"--variant={variant}: set {which} has variants 0 to {last}")
    chosen = []
    for i, exercise in enumerate(SETS[which]):
        number = min(variant, len(exercise.variants))
        exercise = exercise._replace(number=f"{which}{i + 1}")
        chosen.append(exercise._replace(**exercise.variants[number - 1]) if number else exercise)
    return chosen
