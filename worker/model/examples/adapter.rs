//! Reads a LoRA adapter and writes it again, so that `tests/parity/check_export.py adapter` can open what we write in peft.
//!
//! `cargo run --example adapter -- CHECKPOINT ADAPTER OUT`

use std::path::Path;

use candle_core::{DType, Device};
use flotilla_model::{Config, Lora};

fn main() -> flotilla_model::Result<()> {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let [checkpoint, adapter, out] = arguments.as_slice() else {
        eprintln!("usage: adapter CHECKPOINT ADAPTER OUT");
        std::process::exit(2);
    };
    let config = Config::load(Path::new(checkpoint))?;
    let lora = Lora::load(Path::new(adapter), &config, DType::F32, &Device::Cpu)?;
    lora.save(Path::new(out), &config, Some(checkpoint))?;
    println!("{out}: {} tensors", lora.named_vars().len());
    Ok(())
}
