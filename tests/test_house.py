"""Tests of the rules of the house: arrows between files, sizes, README, pieces pasted alone."""

import ast
import json
import re
import sys

import torch

import train
from tests.helpers import HERE, refuses

LIFTABLE = ("models", "losses", "schedulers", "data", "ema")


def files_of(*patterns):
    return [path for pattern in patterns for path in sorted(HERE.glob(pattern))]


PRODUCT = files_of("train.py", *(f"{name}.py" for name in LIFTABLE), "tasks/*.py", "runtime/*.py")


def module_of(path):
    """tasks/ocec.py -> "tasks.ocec"."""
    return ".".join(path.relative_to(HERE).with_suffix("").parts)


OWN = {module_of(path) for path in files_of("*.py", "*/*.py")}


def imports_of(source):
    """[(module, whether in a function)]; of `from tasks import ocec` the module is tasks.ocec."""
    imports = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(name in OWN for name in inside):
                names = inside
        imports += [(name, node.col_offset > 0) for name in names]
    return imports


def allowed_imports(module):
    """The modules of this project that one of them may import, by the arrows of the house."""
    if module in LIFTABLE:
        return set()
    folder, _, name = module.partition(".")
    folders = {f"{word}.{path.stem}" for word in ("tasks", "runtime")
               for path in files_of(f"{word}/*.py")}
    if module == "train":
        return folders | set(LIFTABLE)
    if folder == "runtime":
        runtime = {name for name in folders if name.startswith("runtime.")}
        return runtime | {"data", "losses", "models", "schedulers", "tasks.common"}
    parent = name.removesuffix("_pretrain")
    allowed = {"data", "losses", "models", "tasks.common", f"tasks.{parent}_data"}
    return allowed | {f"tasks.{parent}"} - {module}


def check_imports(module, source):
    """ValueError for an import that the rules forbid."""
    for name, in_function in imports_of(source):
        root = name.split(".")[0]
        if name in OWN:
            fine = name in allowed_imports(module)
        else:  # Pillow is the one optional extra, imported in the function that needs it
            fine = (root in ("torch", "numpy") or root in sys.stdlib_module_names
                    or root == "PIL" and in_function)
        if not fine:
            raise ValueError(f"{module} imports {name}")


def test_house_imports_follow_the_arrows_and_need_torch_and_numpy_only():
    assert len(PRODUCT) > 20
    for path in PRODUCT:
        check_imports(module_of(path), path.read_text())
    for module, line in (
            ("data", "import losses"), ("ema", "from tasks import common"),
            ("tasks.ocec", "from tasks import bidmc_data"), ("tasks.ocec", "import train"),
            ("models", "import PIL"),
            ("tasks.bidmc", "from tasks.bidmc_pretrain import TASKS"),
            ("tasks.seqsetvae", "from runtime import report"), ("tasks.ocec", "import ema"),
            ("runtime.report", "from tasks import ocec"), ("runtime.page", "import ema"),
            ("runtime.page", "def draw():\n    import matplotlib"),
            ("train", "from tests import helpers")):
        refuses(check_imports, f"{module} imports ", module, line)


def length_of(function):
    """Lines of a function without its docstring, and without the line of a decorator."""
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        length -= docstring.end_lineno - docstring.lineno + 1
    return length


def long_functions(source, most=60):
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [function.name for function in functions if length_of(function) > most]


def test_house_functions_have_at_most_60_lines_without_their_docstring():
    body = "\n    pass" * 59
    assert long_functions(f"class A:\n  def f(self):\n    '''One.\n\n    Two.'''{body}") == []
    assert long_functions(f"class A:\n  def f(self):{body}\n    pass") == ["f"]
    for path in PRODUCT:
        assert not long_functions(path.read_text()), (path, long_functions(path.read_text()))


def lines_of(path):
    return len(path.read_text().splitlines())


def test_house_files_are_no_longer_than_their_bounds():
    for most, *patterns in ((850, "train.py"), (700, "tasks/*.py"), (900, "tests/*.py")):
        for path in files_of(*patterns):
            assert lines_of(path) <= most, f"{path} has {lines_of(path)} lines, of {most}"


def test_house_prints_the_sizes_that_are_not_held():
    bounds = {"models": 1850, "losses": 1350, "schedulers": 450, "data": 1250, "ema": 130}
    sizes = []
    for name, most in bounds.items():
        sizes.append(f"{name}.py {lines_of(HERE / f'{name}.py'):,} of {most:,}")
    for title, paths, most in (
            ("runtime/", files_of("runtime/*.py"), ""),
            ("without tests and benchmarks", PRODUCT, " of 14,000"),
            ("tests", files_of("tests/*.py", "test_all.py"), " of 11,000"),
            ("benchmarks", files_of("benchmarks/*.py"), "")):
        sizes.append(f"{title} {sum(map(lines_of, paths)):,}{most}")
    readme = HERE / "README.md"
    words = len(readme.read_text().split())
    sizes.append(f"README.md {lines_of(readme):,} lines of 240, {words:,} words of 2,500")
    print(f"sizes: {'; '.join(sizes)}", flush=True)


def test_house_every_benchmark_takes_quick_as_ci_calls_it():
    scripts = [path for path in files_of("benchmarks/*.py") if not path.name.startswith("_")]
    assert len(scripts) > 15
    assert all("--quick" in script.read_text() for script in scripts)
    assert "benchmarks/[!_]*.py" in (HERE / ".ci" / "run").read_text()


def test_house_lines_have_at_most_100_columns():
    for path in PRODUCT + files_of("test_all.py", "tests/*.py", "benchmarks/*.py"):
        wide = [line for line in path.read_text().splitlines() if len(line) > 100]
        assert not wide, (path, wide[:3])


SGD = "torch.optim.SGD([zeros(1, requires_grad=True)], lr=1.0)"

GEN = "generator=torch.Generator().manual_seed(0)"

THREE_SETS = ("dict(variables=tensor([0, 3, 3, 1]), values=ones(4), sizes=tensor([1, 2, 1]), "
              "minutes=tensor([0.0, 5, 9]), lengths=tensor([2, 1]))")

PIXELS = "zeros(1, 3, 4, 4, dtype=torch.uint8)"

TWO_CLASSES = "zeros(1, 2, 4), ones(1, 4).long()"

NAMES = {name: getattr(torch, name) for name in ("arange", "ones", "randn", "tensor", "zeros")}
NAMES |= {"torch": torch, "nn": torch.nn}

USES = {  # a true expression for every name in README's table and more; see NAMES
    "linear_warmup": "linear_warmup(5, 1.0, warmup_steps=10) == 0.5",
    "warmup_cosine": "warmup_cosine(5, 1.0, total_steps=10) == 0.5",
    "warm_restarts": "warm_restarts(30, 1.0, cycle_steps=10, cycle_mult=2) == 1",
    "WarmupCosine": f"WarmupCosine({SGD}, 10).lr_at(0) == 1",
    "WarmRestarts": f"WarmRestarts({SGD}, 10, cycle_mult=2).lr_at(30) == 1",
    "Constant": f"Constant({SGD}).lr_at(9) == 1",
    "Cyclic": f"Cyclic({SGD}, base_lr=0.1, max_lr=0.5, steps_up=4).get_last_lr() == [0.1]",
    "Plateau": f"Plateau({SGD}).step(3.0) is None",
    "find_lr": "len(find_lr(m := torch.nn.Linear(2, 1), torch.optim.SGD(m.parameters(), lr=0.1), "
               "lambda m, x: m(x).square().mean(), [ones(4, 2)], num_steps=20)) == 3",
    "ema_decay": "ema_decay(8, 0.999) == 0.5",
    "EMA": "EMA(torch.nn.Linear(2, 1)).update(torch.nn.Linear(2, 1)) is None",
    "focal_label_smooth_ce": "focal_label_smooth_ce(zeros(3), ones(3)) > 0",
    "FocalLabelSmoothCE": "FocalLabelSmoothCE()(zeros(3, 4), arange(3)) > 0",
    "dice_loss": f"dice_loss({TWO_CLASSES}) < 0.34",
    "DiceLoss": f"DiceLoss(per='batch')({TWO_CLASSES}) < 0.34",
    "ce_dice_loss": f"ce_dice_loss({TWO_CLASSES}, gamma=2.0)[1]['dice'] < 0.34",
    "CEDiceLoss": f"CEDiceLoss()({TWO_CLASSES}) > 1.19",
    "median_frequency_weights": "median_frequency_weights([1, 4, 16]).tolist() == [2, 1, 0.5]",
    "confusion_matrix": "confusion_matrix([0, 1], [0, 255], 2).tolist() == [[1, 0], [0, 0]]",
    "f_score_per_image": "len(f_score_per_image(np.ones((3, 2, 2)))) == 3",
    "f_score_pooled": "f_score_pooled([[2, 0], [0, 3]]).tolist() == [1, 1]",
    "mean_iou": "mean_iou([[3, 1], [0, 4]]) == 0.775",
    "auto_pos_weight": "auto_pos_weight([0, 0, 0, 1]) == 3",
    "supcon_loss": "abs(supcon_loss(ones(32, 8), arange(32) % 4) - 3.4340) < 1e-4",
    "supcon_bounds": "supcon_bounds([0, 0, 0]) == (math.log(2), math.log(2))",
    "mean_cosine": "mean_cosine([[1, 0], [2, 0]]) == 1",
    "knn_predict": "knn_predict([[1, 0], [0, 1]], [7, 9], [[3, 1]], k=1) == 7",
    "knn_accuracy": "knn_accuracy([[1, 0], [0, 1]], [7, 9], [[3, 1]], [7], k=1) == 1",
    "class_report": "class_report([0, 1, 1], [0, 0, 1], 2)['macro_f1'] == 2 / 3",
    "ridge_predict": "ridge_predict([[0], [1], [9]], [3, 3, 5], [[0], [9]]).tolist() == [3, 5]",
    "ridge_fit": "ridge_fit([[0], [2]], [0, 2], penalty=2)['weights'] == [0.5]",
    "lda_fit": "len(lda_fit([[0], [1], [9]], [3, 3, 5])['weights']) == 1",
    "linear_scores": "linear_scores({'mean': [1], 'sd': [2], 'weights': [3], 'intercept': 4}, "
                     "[[5]]) == 10",
    "logistic_fit": "round(logistic_fit([[0], [1]], [0, 1])['weights'][0], 3) == 0.675",
    "kl_to_standard_normal": "kl_to_standard_normal(ones(3), zeros(3)) == 1.5",
    "set_costs": "set_costs(tensor([[[1.0, 0]]]), tensor([[[2.0, 0]]])).item() == 4",
    "chamfer": "chamfer(tensor([[[1.0, 0]]]), tensor([[[2.0, 0]]]), "
               "y_mask=ones(1, 1).bool()).tolist() == [8]",
    "logistic_predict": "logistic_predict([[0], [1], [2], [9]], [0, 0, 0, 1], [[4.5]]) < 0",
    "weighted_ranking": "weighted_ranking([2.0, 1.0], [1, 0], [[3, 1]])['auroc'] == 1",
    "paired_bootstrap": "paired_bootstrap(lambda w: w[:, 0], lambda w: w[:, 0], [1, 1]) == (0, 0)",
    "bootstrap_ranking": "np.nanmin(bootstrap_ranking([2.0, 1.0], [1, 0])['auroc']) == 1",
    "ranking_interval": "ranking_interval([2.0, 1.0], [1, 0], versus=[2, 1])['auprc_high'] == 0",
    "auroc": "auroc([2.0, 1.0], [1, 0]) == 1",
    "average_precision": "average_precision([2.0, 1.0], [1, 0]) == 1",
    "binary_report": "binary_report([2.0, -1.0], [1, 0])['f1'] == 1",
    "binary_floor": "binary_floor([1, 1, 0, 0])['auroc'] == 0.5",
    "split_by_group": "len(split_by_group(range(10), (0.8, 0.2), seed=0)[0]) == 8",
    "shuffled_batches": "len(shuffled_batches(10, 4, seed=0, epoch=0)) == 3",
    "stratified_batches":
        "len(stratified_batches([0, 1] * 5, 4, seed=0, epoch=0, per_class=2)) == 3",
    "StratifiedBatchSampler": "len(list(StratifiedBatchSampler([0, 1] * 5, 4))) == 3",
    "horizontal_flip": f"horizontal_flip(arange(3)[None], p=1.0, {GEN})[0, 0] == 2",
    "photometric_distort": f"photometric_distort({PIXELS}, p=1.0, {GEN}).shape == (1, 3, 4, 4)",
    "clahe": f"clahe({PIXELS}).shape == (1, 3, 4, 4)",
    "random_affine": f"random_affine(zeros(1, 3, 8, 8), {GEN}, "
                     "masks=zeros(1, 16, 16).long())[1].shape == (1, 8, 8)",
    "color_jitter": f"color_jitter({PIXELS}, strength=0.2, {GEN}).shape == (1, 3, 4, 4)",
    "affine": "affine(ones(1, 3, 8, 8), ones(1), ones(1)).shape == (1, 3, 8, 8)",
    "swap_labels": "swap_labels(tensor([4, 5, 6]), ((4, 5),)).tolist() == [5, 4, 6]",
    "encode_png": "len(encode_png(np.zeros((2, 2), np.uint8))) > 50",
    "bootstrap_interval": "bootstrap_interval([1, 1]) == (1, 1)",
    "random_crop": f"random_crop(zeros(1, 3, 8, 8), padding=2, {GEN}).shape == (1, 3, 8, 8)",
    "random_gamma": f"random_gamma(ones(2, 3, 4, 4), {GEN}).tolist() == ones(2, 3, 4, 4).tolist()",
    "random_noise": f"random_noise(zeros(2, 3, 4, 4), {GEN}).shape == (2, 3, 4, 4)",
    "mixup": f"mixup(zeros(3, 2), ones(3), alpha=0.4, {GEN})[1].tolist() == [1, 1, 1]",
    "cutmix": f"cutmix({PIXELS}, ones(1), alpha=1.0, {GEN})[1].tolist() == [1]",
    "LocalGradients": "LocalGradients()(ones(1, 3, 8, 8)).sum() == 0",
    "StandardisedImage": "StandardisedImage()(ones(1, 3, 8, 8)).sum() == 0",
    "EyeNet": "EyeNet((24, 40), block='inverted_se', head='transformer')("
              "zeros(2, 3, 24, 40)).shape == (2,)",
    "check_parameter_limit": "check_parameter_limit(torch.nn.Linear(3, 2)) is None "
                             "and FACE_PARAMETER_LIMIT == 1_821_085",
    "check_stride_fits": "check_stride_fits((64, 96), 32) is None",
    "ReducedAttention": "ReducedAttention(8, reduction=2)(zeros(2, 4, 6, 8)).shape == (2, 4, 6, 8)",
    "MixMLP": "MixMLP(8)(zeros(2, 4, 6, 8)).shape == (2, 4, 6, 8)",
    "SegFormerLayer": "SegFormerLayer(8, reduction=2)(zeros(2, 4, 6, 8)).shape == (2, 4, 6, 8)",
    "SegFormerStage": "SegFormerStage(3, 8, kernel=3, stride=2, layers=1, reduction=2)("
                      "zeros(2, 3, 8, 12)).shape == (2, 8, 4, 6)",
    "AllMLPDecoder": "AllMLPDecoder((4, 6), 8)([zeros(2, 4, 4, 4), "
                     "zeros(2, 6, 2, 2)]).shape == (2, 8, 4, 4)",
    "LMSA": "LMSA(8)(zeros(2, 8, 4, 6)).shape == (2, 8, 4, 6)",
    "MicroSegFormer": "MicroSegFormer()(zeros(2, 3, 32, 64)).shape == (2, 19, 32, 64)",
    "DilatedBlock": "DilatedBlock(8, dilation=2)(zeros(2, 8, 4, 6)).shape == (2, 8, 4, 6)",
    "UpBlock": "UpBlock(8, 4)(zeros(2, 8, 2, 3), zeros(2, 4, 4, 6)).shape == (2, 4, 4, 6)",
    "FaceCNN": "FaceCNN()(zeros(2, 3, 32, 64)).shape == (2, 19, 32, 64)",
    "flip_average": "flip_average(nn.Conv2d(3, 4, 1), zeros(2, 3, 4, 6), ((1, 2),)).shape "
                    "== (2, 4, 4, 6)",
    "LabelScaler": "LabelScaler().fit([10, 20]).transform(20) == 1",
    "short_digest": "short_digest([1, 'a']) != short_digest(['1a'])",
    "hog_features": "hog_features(zeros(2, 3, 24, 40)).shape == (2, 468)",
    "sampler_report": "sampler_report([[0, 1], [1, 1]], [5, 6])['single_class'] == 1",
    "channel_statistics": "channel_statistics(np.array([[1.0], [5.0]]), [0, 1])[1].tolist() == [2]",
    "bucketed_batches": "len(bucketed_batches([3, 1, 2, 9, 5], 2, seed=0, epoch=0)) == 3",
    "regression_report": "regression_report([12, 20], [14, 18])['mae'] == 2",
    "respiratory_signals": "respiratory_signals(randn(2, 500), 31.25).shape == (2, 3, 500)",
    "upslope_rate": "upslope_rate(torch.sin(arange(1000)[None] * 0.2), 25.0).shape == (1,)",
    "band_spectrum": "band_spectrum(randn(2, 500), 31.25, (0.1, 0.6), 8).shape == (2, 8)",
    "time_stretch": f"time_stretch(zeros(2, 9), ones(2), limit=1.2, {GEN})[0].shape == (2, 9)",
    "load_backbone": "load_backbone(m := nn.Linear(1, 1), "
                     "{f'encoder.{k}': v for k, v in m.state_dict().items()})['scalars'] == 2",
    "freeze_backbone": "callable(freeze_backbone)",
    "train_mode": "train_mode(nn.Linear(1, 1)) is None",
    "PPGEncoder": "PPGEncoder()(zeros(2, 1, 12)).shape == (2, 3, 64)",
    "PPGRegressor": "PPGRegressor(PPGEncoder())(zeros(2, 1, 12)).shape == (2,)",
    "MaskedPatchModel": "MaskedPatchModel(PPGEncoder())(zeros(2, 1, 12), "
                        "zeros(2, 3, dtype=torch.bool)).shape == (2, 3, 4)",
    "count_parameters": "count_parameters(torch.nn.Linear(3, 2)) == 8",
    "grid_positions": "grid_positions(2, 3, 8).shape == (6, 8)",
    "strided_cnn": "strided_cnn(3, (9, 9), width=8)(zeros(2, 3, 9, 9)).shape == (2, 8, 2, 2)",
    "VectorTokens": "VectorTokens(5, width=8)(zeros(2, 5)).shape == (2, 4, 8)",
    "SequenceTokens": "SequenceTokens(channels=3, patch=4, width=8)(zeros(2, 9, 3)).shape "
                      "== (2, 2, 8)",
    "ImageTokens": "ImageTokens(3, (16, 24), width=8)(zeros(2, 3, 16, 24)).shape == (2, 6, 8)",
    "VideoTokens": "VideoTokens(3, (16, 24), width=8)(zeros(2, 5, 3, 16, 24)).shape == (2, 5, 8)",
    "modality_encoder": "modality_encoder((7,), width=8)(zeros(2, 7)).shape == (2, 4, 8)",
    "ModalityReadout": "ModalityReadout(8, heads=2)(zeros(4, 8), zeros(2, 5, 8), "
                       "ones(2).bool()).shape == (2, 4, 8)",
    "drop_modalities": "drop_modalities(ones(9, 3).bool(), 0.9).any(1).all()",
    "QuadModal": "QuadModal(s := {'a': (9, 3), 'b': (5,), 'c': (3, 9, 9), 'd': (2, 3, 9, 9)}, "
                 "modality_dropout=0.5)({k: zeros(2, *v) for k, v in s.items()}, "
                 "{'a': zeros(2).bool()}).shape == (2, 64)",
    "freeze_encoders": "callable(freeze_encoders)",
    "sets_by_size": "[sets.tolist() for sets, _, _ in "
                    "sets_by_size(tensor([1, 3, 1]), chunk=2)] == [[0, 2], [1]]",
    "AttentionBlock": "AttentionBlock(8, heads=2, hidden=6)(zeros(1, 3, 8), "
                      "zeros(2, 5, 8)).shape == (2, 3, 8)",
    "InducedSetAttention": "InducedSetAttention(8, points=3)(zeros(2, 5, 8), "
                           "ones(2, 5).bool()).shape == (2, 5, 8)",
    "SetEncoder": "SetEncoder(6, width=8)(zeros(4, 6), tensor([1, 3])).shape == (2, 8)",
    "log_time_buckets": "log_time_buckets(tensor([0.0, 60, 1440])).tolist() == [0, 33, 58]",
    "TimeBias": "abs(TimeBias(2)(tensor([[0.0, 60]]))[0, 1, 1, 0] + math.log(2)) < 1e-6",
    "SetSequenceEncoder": f"SetSequenceEncoder(4)({THREE_SETS}).shape == (2, 2, 64)",
    "SetDecoder": "SetDecoder(6, width=8, seeds=4)(zeros(2, 8), ones(2, 3).bool())"
                  ".shape == (2, 3, 6)",
    "TransformerLayer": "TransformerLayer(8, heads=2, hidden=6, qkv_bias=False)("
                        "zeros(2, 5, 8), zeros(2, 2, 5, 5)).sum() < 99",
    "SeqSetVAE": f"SeqSetVAE(SetSequenceEncoder(4), seeds=3)({THREE_SETS})['mu'].shape == (3, 64)",
    "SeqSetClassifier":
        f"SeqSetClassifier(SetSequenceEncoder(4), events=True)({THREE_SETS}).shape == (2,)",
    "StrongestEvents": "StrongestEvents(2, width=3)(zeros(5, 2), zeros(5), "
                       "tensor([4, 1])).shape == (2, 3)",
}


def needed_by(docstring):
    """The names under 'Needs:' in a docstring: of this file, and of its imports."""
    listed = re.search(r"Needs:\s*(.*?)(?=\n *[A-Z][a-z]+: |\Z)", docstring or "", re.S)
    return set(re.findall(r"\w+", listed.group(1))) if listed else set()


def test_project_every_public_definition_works_when_pasted_alone():
    """Compile its source, with what its docstring names under 'Needs:', imports too, and nothing
    else."""
    public = set()
    for name in LIFTABLE:
        source = (HERE / f"{name}.py").read_text()
        tree, lines = ast.parse(source), source.splitlines()
        imports, constants, defined = {}, {}, {}
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    imports[alias.asname or alias.name] = ast.get_source_segment(source, node)
            elif isinstance(node, ast.Assign):
                constants |= {target.id: node for target in node.targets}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined[node.name] = node
        public |= {key for key in defined if not key.startswith("_")}

        def text_of(key):
            node = (defined | constants)[key]
            decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
            return "\n".join(lines[min([node.lineno, *decorators]) - 1 : node.end_lineno])

        def needs(key):
            """What 'Needs:' of a definition lists, and what that needs."""
            if key not in defined:
                return set()
            listed = needed_by(ast.get_docstring(defined[key]))
            return listed.union(*map(needs, listed))

        for key in public & defined.keys():
            listed = needs(key)
            order = [word for word in (*constants, *defined) if word in listed | {key}]
            used = set()
            for node in [defined[word] for word in order if word in defined]:
                used |= {word.id for word in ast.walk(node) if isinstance(word, ast.Name)}
            missing = used & (imports | constants | defined).keys() - {key} - listed
            assert not missing, f"{name}.{key}: name {sorted(missing)} under 'Needs:'"
            used_imports = [line for alias, line in imports.items() if alias in listed]
            pasted = {"__name__": "pasted"}
            code = "\n\n".join([*used_imports, *map(text_of, order)])
            exec(compile(code, f"<{name}.{key} alone>", "exec"), pasted)
            assert eval(USES.get(key, "True"), NAMES | pasted), key
    assert USES.keys() <= public, USES.keys() - public


def test_project_readme_pieces_are_where_it_says():
    table = (HERE / "README.md").read_text().split("## Take one piece")[1].split("##")[0]
    count = 0
    for line in table.splitlines():
        if line.count("|") == 4 and "`" in line:
            _, _, names, file, _ = line.split("|")
            [file] = re.findall(r"`([\w/.]+)`", file)
            source = (HERE / file).read_text()
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"^(def|class) {name}\b", source, re.M), (name, file)
                assert "/" in file or name in USES, name
                count += 1
    assert count > 50


def test_project_readme_has_the_table_that_the_results_make():
    sys.path.insert(0, str(HERE / "benchmarks"))
    try:
        import results
    finally:
        sys.path.remove(str(HERE / "benchmarks"))
    content = json.loads((HERE / "docs" / "results.json").read_text())
    assert results.table(content) in (HERE / "README.md").read_text()
    for row, (title, _, flags, keys) in results.ROWS.items():
        train.parse_args([*flags.split(), "--data", "x"])
        for seed in content.get(row, {}).get("seeds", []):
            assert set(keys) <= set(seed["scores"]["model"]), (row, seed["seed"])


def test_project_readme_commands_are_flags_that_exist():
    text = (HERE / "README.md").read_text()
    commands = re.findall(r"(?:python|torchrun [^\n`|]+?) train\.py (--task [^\n`|]+)", text)
    assert len(commands) >= 5
    for words in commands:
        words = words.split("#")[0].split("&&")[0].split()
        if "--help" not in words:
            train.parse_args(words)
    assert "pip install -r requirements.txt && python train.py --task ocec --lr 2e-3" in text
    assert "python test_all.py" in text
