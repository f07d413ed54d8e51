import json
def test_a(tiny_flow, tiny_diffusion):
    from genvision.pipeline import ImagePipeline
    import torch
    for f in (tiny_flow, tiny_diffusion):
        p = ImagePipeline.from_pretrained(f)
        a = p(list(range(10)), output_type="np")
        b = p([1]*10, output_type="np")
        c = p(list(range(10)), output_type="np", guidance_scale=3.0)
        print(a.images[0,...,0], abs(a.images.astype(int)-b.images).mean(), abs(a.images.astype(int)-c.images).mean(), a.network_calls, c.network_calls)
        print((f.parent/"metrics.jsonl").read_text())
