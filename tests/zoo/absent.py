"""Why the other pipeline classes of diffusers are not in the zoo."""

from __future__ import annotations

__all__ = ["NOT_TRIED"]

GROUPS: dict[str, str] = {
    "the base class of all pipelines": "DiffusionPipeline",
    "picks a pipeline class, is none itself": """
        AutoPipelineForImage2Image AutoPipelineForInpainting AutoPipelineForText2Audio AutoPipelineForText2Image""",
    "modular: its blocks run under no_grad; the classic class of the family is in the zoo": """
        Cosmos3DistilledModularPipeline Cosmos3OmniModularPipeline ErnieImageModularPipeline
        Flux2KleinBaseModularPipeline Flux2KleinModularPipeline Flux2ModularPipeline FluxKontextModularPipeline
        FluxModularPipeline HeliosModularPipeline HunyuanVideo15ModularPipeline Ideogram4ModularPipeline
        Krea2ModularPipeline Krea2TurboModularPipeline LTX2ModularPipeline LTX25ModularPipeline LTXModularPipeline
        QwenImage21ModularPipeline QwenImage21TurboModularPipeline QwenImageEditModularPipeline
        QwenImageEditPlusModularPipeline QwenImageLayeredModularPipeline QwenImageModularPipeline
        StableDiffusion3ModularPipeline StableDiffusionXLModularPipeline Wan22Image2VideoModularPipeline
        Wan22ModularPipeline Wan22VaceModularPipeline WanImage2VideoModularPipeline WanModularPipeline
        ZImageModularPipeline""",
    "modular: its blocks run under no_grad, and the family has no classic class": """
        AnimaModularPipeline EchoModularPipeline Flux3DistilledModularPipeline Flux3ModularPipeline
        HeliosPyramidDistilledModularPipeline HeliosPyramidModularPipeline MiniMaxH3ModularPipeline
        MiniMaxMusic3ModularPipeline ModularPipeline WanAnimate2DistilledModularPipeline
        WanAnimate2ModularPipeline""",
    "needs a package that is not installed (onnxruntime, librosa, note_seq, opencv)": """
        AudioDiffusionPipeline ConsisIDPipeline OnnxStableDiffusionImg2ImgPipeline OnnxStableDiffusionInpaintPipeline
        OnnxStableDiffusionInpaintPipelineLegacy OnnxStableDiffusionPipeline OnnxStableDiffusionUpscalePipeline
        SpectrogramDiffusionPipeline StableDiffusionOnnxPipeline""",
    "nested: it calls other pipelines, which are in the zoo one by one": """
        KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline KandinskyInpaintCombinedPipeline
        KandinskyV22CombinedPipeline KandinskyV22Img2ImgCombinedPipeline KandinskyV22InpaintCombinedPipeline
        StableCascadeCombinedPipeline VisualClozePipeline""",
    "no denoising loop: it embeds, upsamples or decodes": """
        FluxPriorReduxPipeline LTX2LatentUpsamplePipeline LTX2VideoDiffusionDecodePipeline LTXLatentUpsamplePipeline""",
    "no scheduler.step in its call: it delegates its stages or steps frame by frame with copies of the scheduler": """
        LTX2DFRPipeline LTX2DFRTemporalRefinePipeline SkyReelsV2DiffusionForcingImageToVideoPipeline
        SkyReelsV2DiffusionForcingPipeline SkyReelsV2DiffusionForcingVideoToVideoPipeline""",
    "pixels go in and come out tile by tile: no sample for the whole clip": "Kandinsky6SRPipeline",
    "discrete text": "DiffusionGemmaPipeline LLaDA2Pipeline",
    "proteins, with two clocks": "RFD4ProteinaPipeline",
    "needs an inversion by the caller beforehand": "LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL",
    "takes a list of step counts instead of num_inference_steps": "HeliosPyramidPipeline",
    "broken in diffusers 0.42.1: reads transformer.config.guidance_embeds, which Chroma does not have": """
        ChromaInpaintPipeline""",
    "broken in diffusers 0.42.1: passes text_encoder_index to an encode_prompt that does not take it": """
        EasyAnimateControlPipeline""",
    "broken in diffusers 0.42.1: reads vae.config.cache_mag_vae, or calls torch.tensor with two arguments": """
        EasyAnimateInpaintPipeline""",
    "deprecated by diffusers": """
        AltDiffusionImg2ImgPipeline AltDiffusionPipeline AmusedImg2ImgPipeline AmusedInpaintPipeline AmusedPipeline
        AudioLDMPipeline BlipDiffusionControlNetPipeline BlipDiffusionPipeline CycleDiffusionPipeline
        DanceDiffusionPipeline I2VGenXLPipeline KarrasVePipeline LDMPipeline MusicLDMPipeline PIAPipeline PNDMPipeline
        PaintByExamplePipeline RePaintPipeline ScoreSdeVePipeline SemanticStableDiffusionPipeline
        StableDiffusionAttendAndExcitePipeline StableDiffusionControlNetXSPipeline StableDiffusionDiffEditPipeline
        StableDiffusionGLIGENPipeline StableDiffusionGLIGENTextImagePipeline StableDiffusionInpaintPipelineLegacy
        StableDiffusionLDM3DPipeline StableDiffusionModelEditingPipeline StableDiffusionPanoramaPipeline
        StableDiffusionParadigmsPipeline StableDiffusionPipelineSafe StableDiffusionPix2PixZeroPipeline
        StableDiffusionSAGPipeline StableDiffusionXLControlNetXSPipeline TextToVideoSDPipeline TextToVideoZeroPipeline
        TextToVideoZeroSDXLPipeline UnCLIPImageVariationPipeline UnCLIPPipeline UniDiffuserPipeline VQDiffusionPipeline
        VersatileDiffusionDualGuidedPipeline VersatileDiffusionImageVariationPipeline VersatileDiffusionPipeline
        VersatileDiffusionTextToImagePipeline VideoToVideoSDPipeline WuerstchenCombinedPipeline
        WuerstchenDecoderPipeline WuerstchenPriorPipeline""",
}

NOT_TRIED: dict[str, str] = {name: reason for reason, names in GROUPS.items() for name in names.split()}
