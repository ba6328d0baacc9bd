//! A handful of rows, some of them bad, and the Dataset that converts them.

use std::path::Path;

use serde_json::json;

use crate::root;

/// Two claims and a Dataset of the rows of [`write_rows`], as YAML.
pub fn dataset(name: &str, max_bad_records: u32) -> String {
    format!(
        "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: source, annotations: {{sandbox.flotilla.dev/seed-from: data}}}}\n\
         spec: {{accessModes: [ReadWriteMany], resources: {{requests: {{storage: 1Mi}}}}}}\n---\n\
         apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: data}}\n\
         spec: {{accessModes: [ReadWriteMany], resources: {{requests: {{storage: 1Mi}}}}}}\n---\n\
         apiVersion: flotilla.dev/v1alpha1\nkind: Dataset\nmetadata: {{name: {name}}}\nspec:\n  \
         source: {{uri: 'pvc://source/rows.jsonl'}}\n  conversion: {{format: {{preference: {{}}}}, maxBadRecords: {max_bad_records}}}\n  \
         storage: {{claimName: data}}\n"
    )
}

/// Two sound rows and three bad ones: a corrupt image, an empty response, an unknown label.
pub fn write_rows(folder: &Path) -> anyhow::Result<()> {
    let picture = std::fs::read_to_string(root().join("tests/fixtures/grey.png.base64"))?;
    let image = format!("data:image/png;base64,{}", picture.trim());
    let rows = [
        json!({ "image": image, "question": "q", "chosen": "1", "rejected": "2" }),
        json!({ "image": "data:image/png;base64,aGVsbG8=", "question": "q", "chosen": "1", "rejected": "2" }),
        json!({ "image": image, "question": "q", "chosen": "", "rejected": "2" }),
        json!({ "image": image, "question": "q", "responses": ["1", "2"], "label": "the left one" }),
        json!({ "image": image, "question": "q", "chosen": "3", "rejected": "4" }),
    ];
    std::fs::create_dir_all(folder.join("data"))?;
    let lines: Vec<String> = rows.iter().map(ToString::to_string).collect();
    Ok(std::fs::write(folder.join("data/rows.jsonl"), lines.join("\n"))?)
}
