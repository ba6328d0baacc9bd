// Pictures that are dropped, pasted and chosen: read, turned upright, made smaller where they are huge, shown as thumbnails.

import { announce } from "./announcer.js";
import { byId, count, element } from "./element.js";
import { tell } from "./notice.js";

/** Pictures of one request, as the server has it. */
const MOST = 16;
/** Longest side that is sent as it is, in pixels: models look at less. */
const LONGEST_SIDE = 3072;
/** Largest file that is sent as it is; the server takes 20 MiB. */
const LARGEST = 8 << 20;
/** Media types that the server decodes. */
const DECODED = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"]);
const QUALITY = 0.92;

/** The pictures of one form. */
export class Pictures {
  /** Pictures as `{ name, url, width, height }`, `url` being a data URL. */
  items = [];

  /** `form` holds an element `[data-pictures]` for the thumbnails and a button `[data-attach]`. */
  constructor(form, notices) {
    this.notices = notices;
    this.place = form.querySelector("[data-pictures]");
    this.place.classList.add("thumbnails");
    const input = element("input", { type: "file", accept: "image/*", multiple: true, class: "unseen", tabindex: "-1", "aria-hidden": "true" });
    input.addEventListener("change", () => {
      this.add([...input.files]);
      input.value = "";
    });
    const button = form.querySelector("[data-attach]");
    button.after(input);
    button.addEventListener("click", () => input.click());
    form.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
      if (files.length === 0) return;
      event.preventDefault();
      this.add(files);
    });
  }

  /** Reads files; tells what was left out or changed. */
  async add(files) {
    const room = MOST - this.items.length;
    if (files.length > room) tell(this.notices, `A request takes ${MOST} pictures: ${count(files.length - room, "picture")} left out.`);
    for (const file of files.slice(0, Math.max(0, room))) {
      try {
        const { picture, changes } = await readPicture(file);
        this.items.push(picture);
        if (changes !== "") tell(this.notices, changes);
        announce(`${picture.name} added, ${count(this.items.length, "picture")}`);
      } catch {
        tell(this.notices, `${file.name} is not a picture that this browser can read.`);
      }
    }
    this.#show();
  }

  /** Takes the pictures out. */
  take() {
    const taken = this.items;
    this.items = [];
    this.#show();
    return taken;
  }

  /** Puts pictures before those that are there, as far as a request takes them. */
  putBack(pictures) {
    this.items = [...pictures, ...this.items].slice(0, MOST);
    this.#show();
  }

  /** Data URLs. */
  get urls() {
    return this.items.map((picture) => picture.url);
  }

  #show() {
    this.place.replaceChildren(...this.items.map((picture, index) => {
      const remove = () => {
        this.items.splice(index, 1);
        this.#show();
        announce(`${picture.name} removed`);
        (this.place.querySelectorAll("button")[Math.min(index, this.items.length - 1)] ?? this.place.closest("form").querySelector("[data-attach]")).focus();
      };
      return element("figure", { class: "thumbnail" }, thumbnail(picture),
        element("button", { type: "button", "aria-label": `Remove ${picture.name}`, title: `Remove ${picture.name}`, on: { click: remove } }, "×"));
    }));
  }
}

/** A small view of a picture. */
export function thumbnail(picture) {
  return element("img", { src: picture.url, alt: `${picture.name}, ${picture.width} by ${picture.height} pixels`, title: picture.name });
}

/** Files that are dropped anywhere go to the pictures that `target()` gives. */
export function acceptDrops(target) {
  const veil = byId("drop");
  const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  let depth = 0;
  const show = (change) => {
    depth = Math.max(0, depth + change);
    veil.hidden = depth === 0;
  };
  addEventListener("dragenter", (event) => carriesFiles(event) && show(1));
  addEventListener("dragleave", (event) => carriesFiles(event) && show(-1));
  addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    show(-depth);
    target()?.add([...event.dataTransfer.files]);
  });
}

async function readPicture(file) {
  const name = file.name || "picture";
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const { width, height } = bitmap;
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const turned = file.type === "image/jpeg" && (await jpegOrientation(file)) > 1;
  if (DECODED.has(file.type) && scale === 1 && !turned && file.size <= LARGEST) {
    bitmap.close();
    return { picture: { name, url: await dataUrl(file), width, height }, changes: "" };
  }
  const size = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  const drawn = await draw(bitmap, size, file);
  const picture = { name, url: await dataUrl(drawn), width: size[0], height: size[1] };
  const changes = scale < 1 ? `${name} is ${width} × ${height} pixels; it is sent as ${size[0]} × ${size[1]}.`
    : turned ? "" : file.size > LARGEST && DECODED.has(file.type) ? `${name} has ${megabytes(file.size)}; it is sent with ${megabytes(drawn.size)}.`
      : `${name} is sent as ${drawn.type === "image/png" ? "PNG" : "JPEG"}.`;
  return { picture, changes };
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

/** The bitmap as a file: without loss where it fits, else as JPEG. */
async function draw(bitmap, [width, height], file) {
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const encoded = (type) => new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("not encoded"))), type, QUALITY);
  });
  if (file.type !== "image/jpeg") {
    const png = await encoded("image/png");
    if (png.size <= LARGEST) return png;
  }
  // JPEG has no transparency: white, as on paper.
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  return encoded("image/jpeg");
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The EXIF orientation of a JPEG, 1 where it has none: the server reads pixels as they are stored. */
async function jpegOrientation(file) {
  const view = new DataView(await file.slice(0, 128 << 10).arrayBuffer());
  try {
    let at = 2;
    while (view.getUint16(at) >= 0xff00 && view.getUint16(at) !== 0xffda) {
      if (view.getUint16(at) === 0xffe1 && view.getUint32(at + 4) === 0x45786966) return exifOrientation(view, at + 10);
      at += 2 + view.getUint16(at + 2);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return 1;
}

function exifOrientation(view, start) {
  const little = view.getUint16(start) === 0x4949;
  const directory = start + view.getUint32(start + 4, little);
  const entries = view.getUint16(directory, little);
  for (let entry = 0; entry < entries; entry += 1) {
    const at = directory + 2 + 12 * entry;
    if (view.getUint16(at, little) === 0x0112) return view.getUint16(at + 8, little);
  }
  return 1;
}
