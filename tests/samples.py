"""Examples of what comes from outside: lines of data sets, trees of answers, a long and nasty text,
the side networks that the authors have released, and what transformers computes."""

import json

import numpy as np
import torch
from helpers import FIXTURES

GLUE_LINES = {  # a header, and two lines of each task, in the columns of GLUE's own files
    "rte": ["index\tsentence1\tsentence2\tlabel", '0\tHe said "no.\tNo.\tentailment',
            "1\ta\tb\tnot_entailment"],
    "mrpc": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tSame.\tSame.",
             "0\t7\t8\tOne.\tTwo."],
    "stsb": ["index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
             "\tscore", "0\tm\tM\t2012\t1\tnone\tnone\tA plane.\tA plane.\t5.000",
             "1\tm\tM\t2012\t4\tnone\tnone\tA man.\tA cat.\t1.25"],
    "cola": ["gj04\t1\t\tThe book was read.", "gj04\t0\t*\tBook the read was."],
    "sst2": ["sentence\tlabel", "it 's a charming journey . \t1", "bad \t0"],
    "qnli": ["index\tquestion\tsentence\tlabel", "0\tWho?\tHe did.\tentailment",
             "1\tWhen?\tNo.\tnot_entailment"],
    "qqp": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tHow?\tHow so?\t1",
            "1\t3\t4\tWhy?\tWhen?\t0"],
    "mnli": ["index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
             "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
             "0\tp\tq\tg\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tA.\tB.\tneutral\tneutral",
             "1\tp\tq\tg\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tC.\tD.\tneutral\tcontradiction"],
}
GLUE_LINES["mnli-mm"] = GLUE_LINES["mnli"]
MMLU_ROW = '"Is it ""1,5"", or\ntwo lines?",one,"two, really",3,None,{}\n'
NASTY_TEXT = json.loads((FIXTURES / "tokenizers/text.json").read_text())


def oasst_tree():
    """A tree in OASST1's form: the best path is q, a1, q2, a3; all else in it must not be taken."""
    ids = iter("abcdefghijklmn")
    node = lambda role, text, *replies, **more: dict(
        message_id=next(ids), role=role, text=text, replies=list(replies), **more
    )
    tree = node(
        "prompter", "q",
        node("assistant", "unranked", rank=None),
        node("assistant", "worse", node("prompter", "but why?", node("assistant", "so")), rank=1),
        node("assistant", "spam", review_result=False, rank=0),
        node("assistant", "deleted", deleted=True, rank=0),
        node(
            "assistant", "a1",
            node("prompter", "never answered"),
            node("prompter", "q2", node("assistant", "a3", node("prompter", "thanks"))),
            node("prompter", "q3", node("assistant", "a4")),
            rank=0, review_result=True,
        ),
    )
    return {"message_tree_id": tree["message_id"], "tree_state": "ready_for_export", "prompt": tree}


def released_state(base, reduction, rank, seed=0):
    """Random tensors under the names, and in the files, of the released code."""
    torch.manual_seed(seed)
    d, s, m = base.config.n_embd, base.config.n_embd // reduction, base.config.n_ffn // reduction
    r, N, opt = torch.randn, base.config.n_layer, base.config.family == "opt"
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    layers = {}
    for i in range(N):
        if opt:
            linears = dict.fromkeys([*names, "self_attn.out_proj"], (s, s))
            linears |= {"fc1": (m, s), "fc2": (s, m)}
            norms = ["self_attn_layer_norm", "final_layer_norm"]
        else:
            linears = dict.fromkeys([*names, "self_attn.o_proj"], (s, s))
            linears |= {"mlp.gate_proj": (m, s), "mlp.up_proj": (m, s), "mlp.down_proj": (s, m)}
            norms = ["input_layernorm", "post_attention_layernorm"]
        for name, shape in linears.items():
            layers[f"{i}.{name}.weight"] = r(shape)
            if opt:
                layers[f"{i}.{name}.bias"] = r(shape[0])
        for name in norms:
            layers[f"{i}.{name}.weight"] = 1 + 0.3 * r(s)
            if opt:
                layers[f"{i}.{name}.bias"] = r(s)
    down = {}
    for i in range(N):
        down[f"{i}.adapter_A.weight"], down[f"{i}.adapter_B.weight"] = r(rank, d), r(s, rank)
        down[f"{i}.post_layer_norm.weight"] = 1 + 0.3 * r(s)
        down[f"{i}.post_layer_norm.bias"] = r(s)
    norm = {"weight": 1 + 0.3 * r(s)} | ({"bias": r(s)} if opt else {})
    return {
        "qst_layers_parameters.pt": layers, "qst_downsample_parameters.pt": down,
        "qst_z_parameters.pt": {str(i): r(s) for i in range(N)}, "qst_norm_parameters.pt": norm,
        "qst_upsample_parameters.pt": {"weight": r(d, s), "bias": r(d)},
        f"lm_head_z_{'parameters' if opt else 'path'}.pt": torch.nn.Parameter(r(d)),
    }


def oracle(folder):
    """What transformers gives, of a folder in fixtures."""
    names = dict(input_ids="idx", mask_right="right", mask_left="left", greedy_from_8="greedy",
                 logits_mask_right="logits_right", logits_mask_left="logits_left")
    z = np.load(folder / "expected.npz")
    return {names.get(k, k): torch.from_numpy(v) for k, v in z.items()}


def put(*keys, value):
    """A function that puts a value into a tree of tables, at the place that `keys` lead to."""
    def changed(spec):
        for key in keys[:-1]:
            spec = spec[key]
        spec[keys[-1]] = value

    return changed
