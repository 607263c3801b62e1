"""Data: digit scenes, sources of image-caption pairs, the tokenizer, augmentation, and the pipeline that joins them.

Nothing is imported here, because each module brings its own libraries (`pip install "repkit[data]"` installs them all):

| module | what it holds | needs |
|---|---|---|
| `scenes` | vocabulary, captions, `zero_shot_prompts`, composition of scenes | scikit-learn, to compose |
| `digit_scenes` | the TFDS builder `DigitScenes` | tensorflow-datasets, Pillow |
| `sources` | `digit_scenes_source`, `tfds_source`, `jsonl_source`, `all_captions` | tensorflow-datasets, Pillow |
| `images` | `load_image` | Pillow |
| `tokenizer` | `Tokenizer`, `train_tokenizer`, `load_tokenizer` | tokenizers |
| `augment` | `Augmentation`, `augment_images`, `augment_texts` | |
| `pipeline` | `make_batches`, `Batches`, `caption_table` | grain, Pillow, tokenizers |
"""
