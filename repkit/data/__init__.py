"""Data: digit scenes and tasks on them, sources of examples, the tokenizer, augmentation, and the pipeline.

Nothing is imported here, because each module brings its own libraries (`pip install "repkit[data]"` installs them all):

| module | what it holds | needs |
|---|---|---|
| `scenes` | vocabulary, captions, `zero_shot_prompts`, composition of scenes | scikit-learn, to compose |
| `scene_tasks` | the generation tasks `TASKS`: questions, captions, translation | scikit-learn, to compose |
| `scene_questions`, `scene_translation`, `scene_demands` | the tasks' grammar, and scenes made to order | |
| `digit_scenes` | the TFDS builder `DigitScenes` | tensorflow-datasets, Pillow |
| `sources` | `digit_scenes_source`, `tfds_source`, `jsonl_source`, `all_captions` | tensorflow-datasets, Pillow |
| `sequence_sources` | `scene_task_source`, `jsonl_sequence_source`, `all_texts` | tensorflow-datasets, Pillow |
| `images` | `load_image` | Pillow |
| `tokenizer` | `Tokenizer`, `train_tokenizer`, `load_tokenizer` | tokenizers |
| `augment` | `Augmentation`, `augment_images`, `augment_texts` | |
| `pipeline` | `make_batches`, `make_sequence_batches`, `Batches`, `caption_table` | grain, Pillow, tokenizers |
"""
