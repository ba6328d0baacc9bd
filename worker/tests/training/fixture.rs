//! A base model, rows and jobs in a directory of their own.

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
};

use flotilla_api::{
    algorithm::{Algorithm, Grpo, Module, Optimizer, Sft},
    conversion::{Conversion, ExactMatch, Format, Instruction, Preference, ResponseOrder},
    progress::{Progress, Stage},
    reward::{Reward, Rule},
    role::{ModelSource, Owner, Prepare, PreparedDataset, Train},
};
use flotilla_worker::{
    WorkerError,
    context::Context,
    device::Wanted,
    progress::ProgressCell,
    role::prepare,
    train::{journal::Line, run::train},
    uri::Volumes,
};
use tokio_util::sync::CancellationToken;

/// A directory with a base model, source rows and prepared datasets.
pub struct Fixture {
    pub dir: tempfile::TempDir,
}

impl Fixture {
    pub fn new() -> Self {
        let fixture = Self {
            dir: tempfile::tempdir().expect("temp dir"),
        };
        fixture.write_base();
        fixture.write_rows();
        fixture
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// The sample's tokenizer and processor with a model of a few thousand parameters.
    pub fn write_base(&self) {
        let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples/critic-digits/base");
        fs::create_dir(self.path("base")).expect("create");
        for entry in fs::read_dir(sample).expect("sample base") {
            let entry = entry.expect("entry");
            fs::copy(entry.path(), self.path("base").join(entry.file_name())).expect("copy");
        }
        let path = self.path("base/config.json");
        let mut config: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).expect("config")).expect("config is JSON");
        for (key, value) in [
            ("hidden_size", 32),
            ("intermediate_size", 48),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 2),
            ("num_key_value_heads", 1),
        ] {
            config[key] = value.into();
        }
        config["rope_scaling"]["mrope_section"] = serde_json::json!([2, 3, 3]);
        for (key, value) in [
            ("depth", 1),
            ("hidden_size", 32),
            ("intermediate_size", 48),
            ("num_heads", 2),
            ("out_hidden_size", 32),
        ] {
            config["vision_config"][key] = value.into();
        }
        config["vision_config"]["fullatt_block_indexes"] = serde_json::json!([0]);
        fs::write(path, config.to_string()).expect("write");
    }

    pub fn write_rows(&self) {
        self.write_source("source", |shade| (shade % 10, (shade + 1) % 10));
    }

    /// Twelve pictures, each with a right and a wrong digit.
    pub fn write_source(&self, source: &str, digits: impl Fn(u8) -> (u8, u8)) {
        fs::create_dir(self.path(source)).expect("create");
        let mut lines = String::new();
        for shade in 0..12_u8 {
            let mut bytes = Vec::new();
            image::RgbImage::from_pixel(8, 8, image::Rgb([shade * 20, 255 - shade * 20, 9]))
                .write_to(&mut Cursor::new(&mut bytes), image::ImageFormat::Png)
                .expect("png");
            fs::write(self.path(&format!("{source}/{shade}.png")), bytes).expect("write");
            let (right, wrong) = digits(shade);
            let row = serde_json::json!({
                "image": format!("{shade}.png"), "question": "What digit is this?", "answer": right.to_string(),
                "chosen": right.to_string(), "rejected": wrong.to_string(),
                "response": format!("<think>I see {right}.</think>\\boxed{{{right}}}"),
            });
            lines.push_str(&format!("{row}\n"));
        }
        fs::write(self.path(&format!("{source}/rows.jsonl")), lines).expect("write");
    }

    pub fn context(&self) -> Context {
        Context {
            owner: Owner {
                kind: "TrainingJob".into(),
                namespace: "n".into(),
                name: "j".into(),
                uid: "u".into(),
            },
            progress: ProgressCell::default(),
            volumes: Volumes::parse(&[format!("data={}", self.dir.path().display())]).expect("volumes"),
            token: None,
            device: device(),
        }
    }

    /// Prepares the rows in one of the three formats.
    pub fn prepare(&self, name: &str, format: Format) -> PreparedDataset {
        self.prepare_from("source", name, format)
    }

    pub fn prepare_from(&self, source: &str, name: &str, format: Format) -> PreparedDataset {
        let context = self.context();
        let spec = Prepare {
            source_uri: format!("pvc://data/{source}"),
            output_uri: format!("pvc://data/datasets/{name}"),
            conversion: Conversion {
                format,
                ..Conversion::default()
            },
        };
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        runtime
            .block_on(prepare::run(context.clone(), spec, CancellationToken::new()))
            .expect("prepared");
        let report = context.progress.snapshot().conversion.expect("report");
        PreparedDataset {
            name: name.into(),
            uri: report.uri,
            digest: report.digest,
            max_rows: 0,
        }
    }

    pub fn pairs(&self) -> PreparedDataset {
        let preference = Preference {
            order: ResponseOrder::Both,
            shuffle_labels: false,
        };
        let format = Format {
            preference: Some(preference),
            ..Format::default()
        };
        self.prepare("pairs", format)
    }

    pub fn questions(&self) -> PreparedDataset {
        self.prepare("questions", exact_match())
    }

    pub fn spec(&self, run: &str, algorithm: Algorithm, datasets: Vec<PreparedDataset>) -> Train {
        let format = Reward {
            rule: Rule::Format,
            weight: 0.1,
        };
        let preference = Reward {
            rule: Rule::Preference,
            weight: 0.9,
        };
        Train {
            model: ModelSource {
                uri: "pvc://data/base".into(),
                digest: None,
                random_seed: Some(3),
            },
            datasets,
            algorithm,
            rewards: vec![preference, format],
            evaluation_sets: vec![self.questions()],
            evaluate_every: 2,
            guard: None,
            seed: 5,
            output_uri: format!("pvc://data/jobs/{run}"),
            checkpoint_every: 1,
            dtype: None,
            keep_last: 100,
            threads: 2,
            rollout: None,
        }
    }

    pub fn sft(&self, run: &str) -> Train {
        let sft = Sft {
            steps: 5,
            batch_size: 10,
            freeze: vec![],
            optimizer: Optimizer {
                learning_rate: 0.01,
                ..Optimizer::default()
            },
        };
        let algorithm = Algorithm {
            grpo: None,
            sft: Some(sft),
        };
        self.spec(run, algorithm, vec![self.prepare("instruction", instruction())])
    }

    pub fn grpo(&self, run: &str, freeze: Vec<Module>) -> Train {
        let grpo = Grpo {
            steps: 3,
            rows_per_step: 6,
            group_size: 4,
            mini_batches: 2,
            max_completion_tokens: 6,
            freeze,
            optimizer: Optimizer {
                learning_rate: 0.01,
                ..Optimizer::default()
            },
            ..Grpo::default()
        };
        let algorithm = Algorithm {
            grpo: Some(grpo),
            sft: None,
        };
        self.spec(run, algorithm, vec![self.pairs()])
    }

    pub fn run(&self, spec: &Train) -> (Result<(), WorkerError>, Progress) {
        let context = self.context();
        let outcome = train(&context, spec, None, &|| false);
        (outcome, context.progress.snapshot())
    }

    /// Runs to the end and gives the manifest of the result: name, size and digest of every file.
    pub fn complete(&self, spec: &Train) -> String {
        let (outcome, progress) = self.run(spec);
        outcome.expect("completes");
        assert_eq!(progress.stage, Stage::Completed);
        let uri = &progress.checkpoints.last().expect("a checkpoint").uri;
        let relative = uri.strip_prefix("pvc://data/").expect("in the claim");
        fs::read_to_string(self.path(relative).join("manifest.json")).expect("manifest")
    }

    pub fn steps(&self, run: &str) -> Vec<u32> {
        let text = fs::read_to_string(self.path(&format!("jobs/{run}/metrics.jsonl"))).expect("metrics");
        text.lines()
            .map(|line| serde_json::from_str::<Line>(line).expect("a line").step)
            .collect()
    }

    /// What a kill -9 leaves in the directory of a run: a stable checkpoint of `step`, lines of later steps, half a line,
    /// half a checkpoint.
    pub fn kill_after(&self, run: &str, step: u32) {
        let checkpoints = self.path(&format!("jobs/{run}/checkpoints"));
        for entry in fs::read_dir(&checkpoints).expect("checkpoints") {
            let path = entry.expect("entry").path();
            let name = path.file_name().expect("name").to_string_lossy().into_owned();
            if name > format!("step-{step:08}") {
                fs::remove_file(path.join("STABLE")).expect("unmark");
                fs::rename(&path, checkpoints.join(format!(".tmp-{name}"))).expect("rename");
            }
        }
        let metrics = self.path(&format!("jobs/{run}/metrics.jsonl"));
        let mut text = fs::read_to_string(&metrics).expect("metrics");
        text.push_str("{\"step\":9");
        fs::write(metrics, text).expect("write");
    }
}

/// Where the runs are computed: on the CPU, unless `make test-cuda` says otherwise.
pub fn device() -> Wanted {
    let wanted = std::env::var("FLOTILLA_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    wanted.parse().expect("a device")
}

pub fn exact_match() -> Format {
    Format {
        exact_match: Some(ExactMatch {}),
        ..Format::default()
    }
}

pub fn instruction() -> Format {
    Format {
        instruction: Some(Instruction {}),
        ..Format::default()
    }
}
