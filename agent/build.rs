//! Embeds the eBPF object that `cargo xtask ebpf` left at `target/ebpf/picomesh.bpf.o`.
//!
//! `PICOMESH_BPF_OBJECT` names another file (an image build has its own place for it). Without an
//! object the agent still builds, so that unit tests need no eBPF toolchain; the loader says at
//! run time what is missing.

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=PICOMESH_BPF_OBJECT");

    let object = match env::var_os("PICOMESH_BPF_OBJECT") {
        Some(path) => {
            let path = PathBuf::from(path);
            println!("cargo::rerun-if-changed={}", path.display());
            if !path.is_file() {
                return Err(io::Error::other(format!(
                    "PICOMESH_BPF_OBJECT={}: no such file; unset it or build one with `cargo xtask ebpf`",
                    path.display()
                )));
            }
            Some(path)
        }
        None => {
            let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?);
            let dir = manifest.join("../target/ebpf");
            let path = dir.join("picomesh.bpf.o");
            if path.is_file() {
                println!("cargo::rerun-if-changed={}", path.display());
                Some(path.canonicalize()?)
            } else {
                // A watched file that is not there would make every build run this again; the
                // directory changes when the object arrives.
                fs::create_dir_all(&dir)?;
                println!("cargo::rerun-if-changed={}", dir.display());
                None
            }
        }
    };

    let source = match object {
        Some(path) => format!(
            "Some(aya::include_bytes_aligned!({:?}))",
            path.display().to_string()
        ),
        None => "None".to_owned(),
    };
    let out = PathBuf::from(env::var("OUT_DIR").map_err(io::Error::other)?);
    fs::write(out.join("object.rs"), source)
}
