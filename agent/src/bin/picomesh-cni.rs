//! The CNI plugin's binary: environment and standard input in, standard output out; everything else
//! is the library's.

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use picomesh::cni::plugin::{Patience, run};

fn main() -> ExitCode {
    let output = run(
        |name| env::var_os(name),
        io::stdin().lock(),
        Patience::default(),
    );
    let told = io::stdout().write_all(&output.text);
    if output.success && told.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
