//! Sums and copies over several GPUs by NCCL, in the order of a [`Gpu`]'s stream and inside its graphs.
//!
//! The library is looked up at its first use under the name that its packages install (`libnccl.so.2`, which cudarc's own
//! loader does not try), and a machine without it gets an error instead of a panic. Types and constants are cudarc's.

use std::{
    ffi::{CStr, c_char, c_int},
    fmt,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use cudarc::{
    driver::sys::{CUresult, CUstream, cuStreamQuery},
    nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId},
};

use super::{Buffer, Gpu, GpuError};
use crate::{
    element::{Dtype, Element, Float},
    shape::ShapeError,
};

const SUCCESS: c_int = 0;
/// A call that goes on in the background; blocking communicators do not see it, their asynchronous error may.
const IN_PROGRESS: c_int = 7;
/// How long a wait spins before it sleeps between looks (decode steps end within it), and how often it asks whether all
/// members are well.
const SPIN: Duration = Duration::from_millis(50);
/// The library may take so long to give a group up: it lets go of it at once, unless graphs are left that hold operations.
const PARTING: Duration = Duration::from_secs(2);

/// The functions that are used, by the declarations of `nccl.h`. Statuses are plain integers: a newer library may return
/// some that are not known here.
struct Library {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> c_int,
    abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
    asynchronous_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    all_reduce: unsafe extern "C" fn(u64, u64, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int,
    all_gather: unsafe extern "C" fn(u64, u64, usize, c_int, ncclComm_t, CUstream) -> c_int,
    broadcast: unsafe extern "C" fn(u64, u64, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int,
    /// Keeps the code mapped.
    _code: libloading::Library,
}

impl Library {
    fn open() -> Result<Self, String> {
        let names = ["libnccl.so.2", "libnccl.so"];
        // SAFETY: loading the library runs its initialisers and nothing else.
        let opened = names.map(|name| unsafe { libloading::Library::new(name) });
        let code = match opened {
            [Ok(code), _] | [_, Ok(code)] => code,
            [Err(error), _] => return Err(error.to_string()),
        };
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the types are those of `nccl.h`; device addresses are passed as 64-bit integers, as a pointer is.
                *unsafe { code.get($name) }.map_err(|error| error.to_string())?
            };
        }
        Ok(Self {
            get_version: function!(b"ncclGetVersion"),
            get_unique_id: function!(b"ncclGetUniqueId"),
            init_rank: function!(b"ncclCommInitRank"),
            abort: function!(b"ncclCommAbort"),
            asynchronous_error: function!(b"ncclCommGetAsyncError"),
            error_string: function!(b"ncclGetErrorString"),
            last_error: function!(b"ncclGetLastError"),
            all_reduce: function!(b"ncclAllReduce"),
            all_gather: function!(b"ncclAllGather"),
            broadcast: function!(b"ncclBroadcast"),
            _code: code,
        })
    }

    fn get() -> Result<&'static Self, GpuError> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        LIBRARY
            .get_or_init(Self::open)
            .as_ref()
            .map_err(|cause| GpuError::NoLibrary {
                library: "libnccl.so.2",
                cause: cause.clone(),
            })
    }

    /// What a status means, with what the library said last.
    fn check(&self, action: &'static str, status: c_int) -> Result<(), GpuError> {
        if status == SUCCESS {
            return Ok(());
        }
        let text = |pointer: *const c_char| {
            if pointer.is_null() {
                return String::new();
            }
            // SAFETY: the library returns strings that end and that it keeps.
            unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
        };
        // SAFETY: both take any status and a null communicator.
        let (meaning, last) = unsafe { ((self.error_string)(status), (self.last_error)(std::ptr::null_mut())) };
        let (mut status, last) = (text(meaning), text(last));
        if !last.is_empty() {
            status = format!("{status} ({last})");
        }
        Err(GpuError::Nccl { action, status })
    }
}

/// Version of the library, as 22809 for 2.28.9.
pub fn version() -> Result<i32, GpuError> {
    let library = Library::get()?;
    let mut version = 0;
    // SAFETY: writes one integer.
    let status = unsafe { (library.get_version)(&raw mut version) };
    library.check("ask for the version", status)?;
    Ok(version)
}

/// Names a group that is to be formed. Rank 0 draws it and gives it to the others.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct UniqueId([u8; Self::BYTES]);

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId")
    }
}

impl UniqueId {
    /// Its size.
    pub const BYTES: usize = 128;

    /// A new one. The process that draws it listens for the others until the group is formed.
    pub fn new() -> Result<Self, GpuError> {
        let library = Library::get()?;
        let mut id = ncclUniqueId {
            internal: [0; Self::BYTES],
        };
        // SAFETY: writes one identity.
        let status = unsafe { (library.get_unique_id)(&raw mut id) };
        library.check("draw an identity", status)?;
        Ok(Self(id.internal.map(c_char::cast_unsigned)))
    }

    /// As it travels.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0
    }

    /// As it arrived.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }
}

/// This GPU's place in a group of GPUs. Operations go into the GPU's stream and return at once; all members must start the
/// same operations in the same order. Graphs that hold operations must be dropped before it.
pub struct Communicator {
    library: &'static Library,
    group: ncclComm_t,
    gpu: Gpu,
    rank: usize,
    size: usize,
    aborted: AtomicBool,
    aborting: Mutex<Option<JoinHandle<()>>>,
}

// SAFETY: the library takes a communicator from any thread, from one at a time.
unsafe impl Send for Communicator {}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicator({} of {})", self.rank, self.size)
    }
}

impl Drop for Communicator {
    /// A process that ends while the library gives the group up crashes.
    fn drop(&mut self) {
        self.abort();
        let aborting = self.aborting.get_mut().unwrap_or_else(PoisonError::into_inner);
        let begin = Instant::now();
        while aborting.as_ref().is_some_and(|thread| !thread.is_finished()) && begin.elapsed() < PARTING {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Communicator {
    /// Joins a group as `rank` of `size`. It waits for all others without a limit: call it once they are known to be there.
    pub fn new(gpu: &Gpu, id: &UniqueId, rank: usize, size: usize) -> Result<Self, GpuError> {
        ShapeError::unless("nccl", rank < size && size <= 1024, || format!("rank {rank} of {size}"))?;
        let library = Library::get()?;
        gpu.bind()?;
        let id = ncclUniqueId {
            internal: id.0.map(u8::cast_signed),
        };
        let mut group = std::ptr::null_mut();
        // SAFETY: the GPU is current in this thread; numbers are small.
        let status = unsafe { (library.init_rank)(&raw mut group, size as c_int, id, rank as c_int) };
        library.check("join the group", status)?;
        Ok(Self {
            library,
            group,
            gpu: gpu.clone(),
            rank,
            size,
            aborted: AtomicBool::new(false),
            aborting: Mutex::default(),
        })
    }

    /// Which member this is.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Members.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The GPU in whose stream operations are done.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn usable(&self) -> Result<(), GpuError> {
        if self.aborted.load(Ordering::Acquire) {
            return Err(GpuError::Nccl {
                action: "use the group",
                status: "it was given up after an error".to_owned(),
            });
        }
        self.gpu.bind()
    }

    /// Replaces `values` by their sums over all members, the same bits everywhere. Of bf16, every addition is rounded.
    pub fn all_reduce_sum<T: Float>(&self, values: &Buffer<T>) -> Result<(), GpuError> {
        if values.is_empty() {
            return Ok(());
        }
        self.usable()?;
        let dtype = match T::DTYPE {
            Dtype::F32 => ncclDataType_t::ncclFloat32,
            Dtype::Bf16 => ncclDataType_t::ncclBfloat16,
        };
        let at = values.pointer();
        let (count, sum) = (values.len(), ncclRedOp_t::ncclSum as c_int);
        // SAFETY: the range is allocated, and stays so in the order of the stream.
        let status = unsafe {
            (self.library.all_reduce)(
                at,
                at,
                count,
                dtype as c_int,
                sum,
                self.group,
                self.gpu.stream.cu_stream(),
            )
        };
        self.library.check("all-reduce", status)
    }

    /// Writes the parts of all members one after the other to `whole`, in the order of ranks. Nothing is copied where `part`
    /// is this rank's part of `whole`.
    pub fn all_gather<T: Element>(&self, part: &Buffer<T>, whole: &Buffer<T>) -> Result<(), GpuError> {
        ShapeError::length("all_gather", "the whole", whole.len(), self.size * part.len())?;
        if part.is_empty() {
            return Ok(());
        }
        self.usable()?;
        let (bytes, kind) = (part.len() * size_of::<T>(), ncclDataType_t::ncclUint8 as c_int);
        let stream = self.gpu.stream.cu_stream();
        // SAFETY: as above; the whole has room for all parts.
        let status =
            unsafe { (self.library.all_gather)(part.pointer(), whole.pointer(), bytes, kind, self.group, stream) };
        self.library.check("all-gather", status)
    }

    /// Replaces `values` by those of the rank `root`.
    pub fn broadcast<T: Element>(&self, values: &Buffer<T>, root: usize) -> Result<(), GpuError> {
        ShapeError::unless("broadcast", root < self.size, || {
            format!("rank {root} of {}", self.size)
        })?;
        if values.is_empty() {
            return Ok(());
        }
        self.usable()?;
        let (bytes, kind) = (values.len() * size_of::<T>(), ncclDataType_t::ncclUint8 as c_int);
        let (at, stream) = (values.pointer(), self.gpu.stream.cu_stream());
        // SAFETY: as above.
        let status = unsafe { (self.library.broadcast)(at, at, bytes, kind, root as c_int, self.group, stream) };
        self.library.check("broadcast", status)
    }

    /// Waits for everything in the stream, but no longer than `limit`, and not after the library has seen a member fail or
    /// `well` has said that one is gone, which it is asked now and then. A kernel of the library waits for its peers without
    /// end: after an error the group is given up, which ends it, so that reading or freeing memory does not hang.
    pub fn wait(&self, limit: Duration, mut well: impl FnMut() -> bool) -> Result<(), GpuError> {
        self.usable()?;
        let begin = Instant::now();
        let mut asked_well = begin;
        loop {
            // SAFETY: the stream is alive.
            match unsafe { cuStreamQuery(self.gpu.stream.cu_stream()) } {
                CUresult::CUDA_SUCCESS => return Ok(()),
                CUresult::CUDA_ERROR_NOT_READY => {}
                failed => {
                    self.abandon();
                    let source = cudarc::driver::result::DriverError(failed);
                    return Err(GpuError::Driver {
                        action: "wait for the group",
                        source,
                    });
                }
            }
            let mut status = SUCCESS;
            // SAFETY: writes one integer.
            let asked = unsafe { (self.library.asynchronous_error)(self.group, &raw mut status) };
            let failed = if asked == SUCCESS { status } else { asked };
            if failed != SUCCESS && failed != IN_PROGRESS {
                let error = self.library.check("wait for the group", failed);
                self.abandon();
                return error;
            }
            let waited = begin.elapsed();
            let gone = asked_well.elapsed() > SPIN && {
                asked_well = Instant::now();
                !well()
            };
            if gone || waited > limit {
                self.abandon();
                let why = if gone { "left" } else { "stopped" };
                return Err(GpuError::Nccl {
                    action: "wait for the group",
                    status: format!(
                        "rank {} of {} waited for {waited:?}: a member has {why}",
                        self.rank, self.size
                    ),
                });
            }
            if waited < SPIN {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// As [`Self::abort`], without waiting for it: the library ends its kernels at once, but returns only when the last graph
    /// that holds operations is gone, and those are the caller's.
    fn abandon(&self) {
        if self.aborted.swap(true, Ordering::AcqRel) {
            return;
        }
        let (library, gpu, group) = (self.library, self.gpu.clone(), self.group as usize);
        let abort = move || {
            if gpu.bind().is_ok() {
                // SAFETY: the communicator is alive, and nobody else uses it any more.
                let _ = unsafe { (library.abort)(group as ncclComm_t) };
            }
        };
        // Without a thread the kernels wait on, and the process has to be ended.
        let thread = std::thread::Builder::new().name("nccl".to_owned()).spawn(abort);
        *self.aborting.lock().unwrap_or_else(PoisonError::into_inner) = thread.ok();
    }

    /// Leaves without asking the others: it never waits for a peer that is gone. Members that are well call it once all of
    /// them have passed a barrier.
    fn abort(&self) {
        if !self.aborted.swap(true, Ordering::AcqRel) && self.gpu.bind().is_ok() {
            // SAFETY: the communicator is alive, and not used after.
            let _ = unsafe { (self.library.abort)(self.group) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without the library this is an error that says what to do; with it, a version.
    #[test]
    fn a_missing_library_is_an_error() {
        match version() {
            Ok(version) => assert!(version >= 20_000, "{version}"),
            Err(error) => assert!(error.to_string().contains("libnccl.so.2"), "{error}"),
        }
    }
}
