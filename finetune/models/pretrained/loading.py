"""Open a pipeline: from the Hub, a diffusers folder, one .safetensors file, or, from scratch, from the recipe."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from finetune.adapters.lora_file import LORA_FILE
from finetune.config.schema import Model as ModelSection
from finetune.config.schema import Recipe, Token
from finetune.data.audit.audit import Audit
from finetune.errors import UserError, did_you_mean
from finetune.models.pretrained.single_file import (
    architecture,
    clip_tokenizer,
    open_single_file,
    open_single_vae,
    open_transformer,
    read_shapes,
    require_class,
)
from finetune.models.pretrained.tokenizer import learn_tokenizer
from finetune.models.pretrained.vae import latents_of
from finetune.models.registry import spec_of, variants
from finetune.paths import embedded
from finetune.planning import Plan
from finetune.replaceable import replaceable

if TYPE_CHECKING:
    from finetune.models.pretrained.family import Family

PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
CONVERT = "use a .safetensors version, or convert it: load it in ComfyUI or A1111 and save it as .safetensors"


@replaceable
def open_pipeline(
    section: ModelSection, class_name: str, dtype: torch.dtype, own: Mapping[str, torch.dtype] = MappingProxyType({})
) -> DiffusionPipeline:
    """Open the pretrained pipeline that `model.path` names.

    Weights are in `dtype`, the VAE in float32, and the parts in `own` in their own dtype.

    `model.path` is a Hub name, a diffusers folder, a run of this project, or one .safetensors checkpoint.
    `model.transformer` and `model.vae` replace those parts.

    Raises:
        UserError: it does not exist, cannot be reached, is incomplete, or has another class.
    """
    given = section.path or ""
    path = place(given, "model.path")
    vae = open_vae(section.vae, class_name) if section.vae else None
    with explained(given, "model.path"):
        if path is not None and path.is_file():
            opened = open_single_file(path, class_name, torch.float32 if own else dtype, vae)
            for name, part in opened.components.items():
                if own and isinstance(part, torch.nn.Module) and name != "vae":
                    part.to(own.get(name, dtype))
            return opened
        cls, source = getattr(diffusers, class_name), str(path or given)
        index = read_index(path or hub_folder(given))
        require_class(index["_class_name"], class_name, given)
        refuse_foreign(index, given)
        replaced: dict[str, Any] = {"vae": vae} if vae else {}
        if section.transformer is not None:
            with explained(section.transformer, "model.transformer"):
                file = Path(section.transformer).expanduser()
                net, weights = getattr(diffusers, index["transformer"][1]), own.get("transformer", dtype)
                replaced["transformer"] = open_transformer(file, section.family, net, source, weights)
        if (
            class_name == "StableDiffusionPipeline"
        ):  # the safety checker, which only filters finished images, is not loaded
            replaced |= {
                "safety_checker": None,
                "feature_extractor": None,
                "image_encoder": None,
                "requires_safety_checker": False,
            }
        if path:
            require_pieces(path, index, replaced)
        # The VAE stays in float32 whatever the precision: rounded weights would shift every latent.
        dtypes = {"default": dtype, **own} | ({} if vae else {"vae": torch.float32})
        pipeline: DiffusionPipeline = cls.from_pretrained(source, dtype=dtypes, use_safetensors=True, **replaced)
        return pipeline


@replaceable
def open_vae(given: str, class_name: str = "") -> AutoencoderKL:
    """Open the VAE that `model.vae` names, in float32.

    `model.vae` is a Hub name, a folder (also a pipeline's), a run, or one .safetensors file.

    Args:
        given: the value in the recipe.
        class_name: pipeline that it is for; a single file does not contain the scale of its latents, the family's
            record does.
    """
    path = place(given, "model.vae")
    with explained(given, "model.vae"):
        if path is not None and path.is_file():
            return open_single_vae(path, class_name)
        if path is not None and (path / "model_index.json").is_file():
            path = path / "vae"
        if path is not None:
            _require_weights(path)
        else:
            hf_hub_download(given, "config.json")  # its errors are clearer than those of diffusers
        found: AutoencoderKL = AutoencoderKL.from_pretrained(
            str(path or given), dtype=torch.float32, use_safetensors=True
        )
        return found


def place(given: str, where: str) -> Path | None:
    """The file or folder that a recipe names (of a run: its `final`), or None for a name on the Hub.

    Raises:
        UserError: it looks like a path that does not exist, or it is not a model.
    """
    path = Path(embedded(given)).expanduser()
    if not path.exists():
        # A Hub name is owner/name; if ./owner is a folder, a path was meant.
        local = given.startswith((".", "/", "~", "embedded:")) or given.count("/") != 1 or path.parent.is_dir()
        if local or path.suffix in {".safetensors", *PICKLES}:
            raise UserError(
                f"there is no file or folder {given}",
                where=where,
                remedy="correct the path; a model on the Hub is written owner/name",
            )
        return None
    if path.is_file():
        if path.suffix in PICKLES:
            raise UserError(
                f"{path.name} is a pickle, which can run arbitrary code when it is opened", where=where, remedy=CONVERT
            )
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path.name} is not a model file",
                where=where,
                remedy="give a diffusers folder, a .safetensors file, or a Hub name",
            )
        return path
    final = path / "final"
    if (path / "recipe.yaml").is_file() and not final.is_dir():
        raise UserError(
            f"the run {given} has no final weights yet",
            where=where,
            remedy=f"finish it: ft train {path / 'recipe.yaml'} --resume",
        )
    path = final if final.is_dir() else path
    if (path / LORA_FILE).is_file() or any(path.glob("*/adapter_config.json")):
        raise UserError(
            f"{given} holds an adapter, not a base model",
            where=where,
            remedy=f"give its base model, or merge the two: ft export {given} --merge",
        )
    return path


def ask_hub(given: str) -> None:
    """Ask the Hub once for a model's `model_index.json`.

    Raises:
        HfHubHTTPError, OfflineModeIsEnabled: as the Hub's client does.
        ConnectionError: the Hub cannot be reached.
    """
    try:
        get_hf_file_metadata(hf_hub_url(given, "model_index.json"))
    except (HfHubHTTPError, OfflineModeIsEnabled):
        raise
    except Exception as error:  # those of the HTTP client
        raise ConnectionError(str(error)) from error


def hub_folder(given: str) -> Path:
    """The folder in the local cache with the `model_index.json` of a model on the Hub; it is downloaded if missing."""
    if not isinstance(try_to_load_from_cache(given, "model_index.json"), str):
        ask_hub(given)  # fails at once where the download would try again for half a minute
    return Path(hf_hub_download(given, "model_index.json")).parent


def read_index(folder: Path) -> dict[str, Any]:
    """Read model_index.json of a pipeline's folder."""
    if not (folder / "model_index.json").is_file():
        alone = " (it is the folder of a single network)" if (folder / "config.json").is_file() else ""
        raise UserError(
            f"{folder} is not a diffusers pipeline: it has no model_index.json{alone}",
            where="model.path",
            remedy="give the folder that holds model_index.json, unet/, vae/, …",
        )
    found: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return found


def refuse_foreign(index: dict[str, Any], given: str) -> None:
    """Raise if a part of a pipeline is in neither diffusers nor transformers: it would be custom code."""
    for name, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if library not in (None, "diffusers", "transformers") and not hasattr(diffusers.pipelines, str(library)):
            raise UserError(
                f'{given} needs its {name} from "{library}": custom code of a model is never run',
                where="model.path, model_index.json",
                remedy="give a model whose parts are classes of diffusers and transformers",
            )


def require_pieces(folder: Path, index: dict[str, Any], replaced: dict[str, Any]) -> None:
    """Raise if a folder that the index names is missing, or a network has no safetensors weights."""
    for name, entry in index.items():
        if name in replaced or not isinstance(entry, list) or entry[0] is None:
            continue
        if not (folder / name).is_dir():
            raise UserError(
                f"the pipeline lacks its {name}", where=str(folder / name), remedy="download the whole model again"
            )
        if name.startswith(("unet", "transformer", "vae", "text_encoder")):
            _require_weights(folder / name)


def _require_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if any(file.suffix in PICKLES for file in folder.glob("*")):
        raise UserError(
            "the weights are pickles (.bin), which can run arbitrary code when opened",
            where=str(folder),
            remedy=CONVERT,
        )
    raise UserError("there are no weights (.safetensors)", where=str(folder), remedy="download the whole model again")


@contextlib.contextmanager
def explained(given: str, where: str) -> Iterator[None]:
    """Turn the libraries' errors about a model that cannot be loaded into errors that say what to do."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        message = str(error).strip().partition("\n")[0]
        page = f"https://huggingface.co/{given}"
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            problem = f'access to "{given}" on the Hub requires accepting its license'
            remedy = f"accept the license on {page}, then `hf auth login` with a token of that account"
        elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            problem = f'there is no model "{given}" on the Hub that you have access to'
            remedy = (
                f"correct the name (see {page}); for a private model, `hf auth login` with an account that has access"
            )
        elif any(
            isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError | ConnectionError) for cause in causes
        ):
            problem = f'"{given}" is not a local folder, and the Hub cannot be reached'
            remedy = (
                "give a folder or a .safetensors file, or connect to the internet (gated models need `hf auth login`)"
            )
        elif any(isinstance(cause, EntryNotFoundError) for cause in causes):
            problem, remedy = (
                f'"{given}" on the Hub is not a diffusers model',
                "download its .safetensors file and give the file's path",
            )
        elif isinstance(
            error, NotImplementedError
        ):  # diffusers moves a network off the meta device without all its weights
            problem, remedy = f'"{given}" lacks some weights of its UNet or VAE', "download it again"
        else:
            problem, remedy = (
                f'"{given}" could not be loaded: {message}',
                "download it again, or give another copy; weights must be .safetensors",
            )
        raise UserError(problem, where=where, remedy=remedy) from error


@dataclass(frozen=True)
class Reader:
    """How a model's text encoders will read a caption.

    `count`: caption → (tokens of its text, most tokens that are read).
    """

    tokenizer: Any
    count: Callable[[str], tuple[int, int]]


def open_reader(recipe: Recipe, captions: Iterable[str]) -> Reader | None:
    """Open the tokenizer that reads the most tokens of a caption; None if captions are not read.

    Args:
        captions: of the training images; a model from scratch learns its tokenizer from them.

    Raises:
        UserError: it does not exist or cannot be reached.
    """
    section = recipe.model
    if not spec_of(section.family).pretrained:
        return None
    if recipe.method == "scratch":
        words = section.build.get("tokenizer", {})
        return _plain_reader(learn_tokenizer(captions, words.get("vocabulary", 4096), words.get("length", 77)))
    from finetune.models.pretrained.family import ClipFamily, family_of

    family, given = family_of(section.family), section.path or ""
    path = place(given, "model.path")
    with explained(given, "model.path"):
        if path is not None and path.is_file():
            variant = variants()[architecture(read_shapes(path), path)][1]
            return _plain_reader(clip_tokenizer(variant.padding["tokenizer"]), recipe.tokens)
        tokenizer = AutoTokenizer.from_pretrained(str(path or given), subfolder=family.reader)
    if isinstance(family, ClipFamily):
        return _plain_reader(tokenizer, recipe.tokens)
    # Templates and system prompts belong to the pipeline, also to one without networks.
    cls: Any = getattr(diffusers, family.spec.pipeline)
    parts = {
        name
        for name, asked in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and asked.default is asked.empty
    }
    pipeline = cls(**dict.fromkeys(parts) | {family.reader: tokenizer})
    return Reader(tokenizer, lambda caption: family.caption_tokens(pipeline, caption))


def _plain_reader(tokenizer: Any, tokens: Sequence[Token] = ()) -> Reader:
    """Args:
    tokens: to be trained: each is one entry of the tokenizer for each of its vectors.
    """
    from finetune.models.pretrained.textual_inversion import spelled

    tokenizer.add_tokens([entry for token in tokens for entry in spelled(token)])

    def count(caption: str) -> tuple[int, int]:
        for token in tokens:
            caption = caption.replace(token.token, " ".join(spelled(token)))
        return len(tokenizer(caption, verbose=False).input_ids), tokenizer.model_max_length

    return Reader(tokenizer, count)


def assemble(plan: Plan, audit: Audit, family: Family) -> DiffusionPipeline:
    """Assemble a Stable Diffusion pipeline from `model.build`: random weights, a tokenizer learned from the captions.

    Keys of `model.build`: `unet` (arguments of UNet2DConditionModel), `text_encoder` (of CLIPTextConfig), `tokenizer`
    (`vocabulary`: entries; `length`: tokens per caption), `scheduler` (of DDIMScheduler). The VAE is `model.vae`.
    """
    section = plan.recipe.model
    if family.spec.pipeline != "StableDiffusionPipeline":
        raise UserError(
            "text-to-image models from scratch must be of family sd",
            where="model.family",
            remedy="set model.family: sd",
        )
    if section.vae is None:
        raise UserError(
            "a latent diffusion model needs a VAE",
            where="model.vae",
            remedy="train scratch/emoji-vae first, and set model.vae to its run",
        )
    parts = section.build
    for key in parts.keys() - {"unet", "text_encoder", "tokenizer", "scheduler"}:
        raise UserError(
            f'unknown key "{key}"',
            where="model.build",
            remedy=did_you_mean(key, ["unet", "text_encoder", "tokenizer", "scheduler"]),
        )
    vae = open_vae(section.vae)
    words = parts.get("tokenizer", {})
    tokenizer = learn_tokenizer(
        (p.caption for p in audit.training), words.get("vocabulary", 4096), words.get("length", 77)
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            **checked(CLIPTextConfig, parts.get("text_encoder", {}), "model.build.text_encoder"),
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        sample_size=plan.recipe.data.resolution // latents_of(vae).factor,
        cross_attention_dim=text_encoder.config.hidden_size,
        **checked(UNet2DConditionModel, parts.get("unet", {}), "model.build.unet"),
    )
    scheduler = DDIMScheduler(**checked(DDIMScheduler, parts.get("scheduler", {}), "model.build.scheduler"))
    return diffusers.StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def checked(cls: type, arguments: dict[str, Any], key: str) -> dict[str, Any]:
    """Return `arguments` if the class takes each of them by name.

    Raises:
        UserError: it does not; the error gives the nearest name.
    """
    known = set(inspect.signature(cls).parameters) - {"kwargs"} | set(getattr(cls, "__annotations__", ()))
    for name in arguments:
        if name not in known:
            raise UserError(f'{cls.__name__} has no argument "{name}"', where=key, remedy=did_you_mean(name, known))
    return arguments
