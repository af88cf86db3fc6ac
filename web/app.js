// Send one image to /v1/segment and draw the mask over it. Nothing is stored or sent elsewhere.

const COLOURS = [
  [230, 60, 60], [60, 140, 240], [250, 190, 40], [70, 190, 90], [170, 90, 220], [60, 200, 200],
];
const element = (id) => document.getElementById(id);
const state = { file: null, picture: null, mask: null, link: null };

function showStatus(text, isError = false) {
  element("status").textContent = text;
  element("status").className = isError ? "error" : "";
}

// Browsers turn a picture by its orientation tag, the service does not. Without the tag the
// picture lies as its mask does.
function withoutOrientation(buffer) {
  const bytes = new Uint8Array(buffer);
  if (bytes[0] === 0xff && bytes[1] === 0xd8) return hideJpegTags(bytes);
  if (bytes[0] === 0x89 && bytes[1] === 0x50) return cutPngTags(bytes);
  return [bytes];
}

// In a JPEG the tag is in APP1 segments. Rename them to APP15, which nobody reads.
function hideJpegTags(bytes) {
  const view = new DataView(bytes.buffer);
  let i = 2;
  while (i + 4 < bytes.length && bytes[i] === 0xff && bytes[i + 1] !== 0xda) {
    if (bytes[i + 1] === 0xe1) bytes[i + 1] = 0xef;
    i += 2 + view.getUint16(i + 2);
  }
  return [bytes];
}

// In a PNG the tag is in the chunk eXIf. Leave that chunk out.
function cutPngTags(bytes) {
  const view = new DataView(bytes.buffer);
  let i = 8;
  while (i + 12 < bytes.length) {
    const end = i + 12 + view.getUint32(i);
    if (view.getUint32(i + 4) === 0x65584966) return [bytes.subarray(0, i), bytes.subarray(end)];
    i = end;
  }
  return [bytes];
}

// Return null for an image that the browser cannot show, such as DICOM or TIFF.
async function decode(file) {
  try {
    return await createImageBitmap(new Blob(withoutOrientation(await file.arrayBuffer())));
  } catch {
    return null;
  }
}

// Turn the mask into coloured pixels that are transparent outside the classes.
// A mask of one class has grey 0 or 255, one of several classes has class ids.
function paint(bitmap, numClasses) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const id = numClasses === 1 ? Number(pixels.data[i] > 0) : pixels.data[i];
    const colour = COLOURS[(id - 1 + COLOURS.length) % COLOURS.length];
    pixels.data.set(id ? [...colour, 255] : [0, 0, 0, 0], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function draw() {
  const view = element("view");
  view.width = state.mask.width;
  view.height = state.mask.height;
  const context = view.getContext("2d");
  if (state.picture) context.drawImage(state.picture, 0, 0);
  context.globalAlpha = element("opacity").value / 100;
  context.drawImage(state.mask, 0, 0);
}

function tabulate(areas, quality) {
  const rows = areas.map((area) => {
    const cm2 = area.area_mm2 === null ? "" : `, ${(area.area_mm2 / 100).toFixed(1)} cm²`;
    return [area.class, `${area.area_pixels} pixels${cm2}`];
  });
  if (quality) {
    const [dice, low, high] = ["", "_low", "_high"].map((end) => quality[`predicted_dice${end}`].toFixed(2));
    rows.push(["predicted Dice", `${dice} (${low} to ${high})`]);
  }
  element("figures").tBodies[0].replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    for (const text of cells) row.insertCell().textContent = text;
    return row;
  }));
  const summary = rows.map((cells) => cells.join(" ")).join("; ");
  element("view").setAttribute("aria-label", `The mask over the image: ${summary}`);
}

async function send() {
  const file = state.file; // a later file replaces it, and its answer is then ignored
  element("result").hidden = true;
  showStatus("Segmenting …");
  const headers = { Accept: "image/png" };
  if (element("key").value) headers["X-API-Key"] = element("key").value;
  let answer;
  try {
    answer = await fetch("v1/segment", { method: "POST", body: file, headers });
  } catch {
    return file === state.file && showStatus("The service cannot be reached.", true);
  }
  if (file !== state.file) return;
  element("key-row").hidden = answer.status !== 401;
  if (answer.status === 406) {
    return showStatus("A volume: this page shows single images. Use POST /v1/segment.", true);
  }
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({ detail: `status ${answer.status}` }));
    return showStatus(`Failed: ${problem.detail ?? problem.title}`, true);
  }
  let mask, areas, quality, notes, picture, bitmap;
  try {
    mask = await answer.blob();
    areas = JSON.parse(answer.headers.get("X-Areas"));
    quality = JSON.parse(answer.headers.get("X-Quality") ?? "null");
    notes = JSON.parse(answer.headers.get("X-Notes") ?? "[]"); // how the file was read
    [picture, bitmap] = await Promise.all([decode(file), createImageBitmap(mask)]);
  } catch {
    return file === state.file && showStatus("The answer cannot be shown.", true);
  }
  if (file !== state.file) return;
  const sameSize = picture?.width === bitmap.width && picture?.height === bitmap.height;
  state.picture = sameSize ? picture : null;
  state.mask = paint(bitmap, areas.length);
  if (state.link) URL.revokeObjectURL(state.link);
  state.link = element("download").href = URL.createObjectURL(mask);
  tabulate(areas, quality);
  draw();
  element("result").hidden = false;
  const onBlack = "Done. The browser cannot show this image, so the mask is on black.";
  showStatus([state.picture ? "Done." : onBlack, ...notes].join(" "), quality?.unusual);
}

function choose(file) {
  if (!file) return;
  state.file = file;
  send();
}

element("file").addEventListener("change", (event) => choose(event.target.files[0]));
element("retry").addEventListener("click", send);
element("opacity").addEventListener("input", draw);
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files[0]);
  });
}
