"""Small trees of the six evaluation sets in their public layouts: names, dtypes, units, codes."""

import h5py
import numpy as np
import scipy.io
from PIL import Image

SHAPE = (12, 16)
FAR = 7.25

# Two samples of each set, in the order of the source.
NAMES = {
    "nyu": ("kitchen_0004/0001", "office_0005/0009"),
    "kitti": (
        "2011_09_26_drive_0002_sync/image_02/0000000069",
        "2011_09_28_drive_0001_sync/image_03/0000000005",
    ),
    "eth3d": ("courtyard/DSC_0286", "office/DSC_0219"),
    "scannet": ("scene0011_00/000300", "scene0406_02/001100"),
    "diode": (
        "indoors/scene_00019/scan_00183/00019_00183_indoors_000_010",
        "outdoor/scene_00022/scan_00193/00022_00193_outdoor_010_000",
    ),
    "ibims": ("corridor_01", "office_02"),
}


def plane(metres=2.5, shape=SHAPE):
    """A wall with something behind it at [1,2] and no depth at [0,0]."""
    depth = np.full(shape, metres, np.float64)
    depth[1, 2] *= FAR / 2.5
    depth[0, 0] = 0
    return depth


def gradient(shape=SHAPE):
    """A picture whose rows and columns cannot be confused."""
    image = np.zeros((*shape, 3), np.uint8)
    image[..., 0] = np.arange(shape[0])[:, None] * 9
    image[..., 1] = np.arange(shape[1])[None] * 7
    image[..., 2] = 40
    return image


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def counts(depth, per_metre):
    return np.rint(depth * per_metre).astype(np.uint16)


def write_nyu(root, name, depth, image):
    scene, number = name.split("/")
    folder = root / "test" / scene
    save(folder / f"filled_{number}.png", counts(np.maximum(depth, 1), 1000))
    return {
        "image": save(folder / f"rgb_{number}.png", image),
        "depth": save(folder / f"depth_{number}.png", counts(depth, 1000)),
    }


def kitti_line(name):
    drive, camera, frame = name.split("/")
    picture = f"{drive[:10]}/{drive}/{camera}/data/{frame}.png"
    return f"{picture} {drive}/proj_depth/groundtruth/{camera}/{frame}.png 721.5377"


def write_kitti(root, name, depth, image, raw="", annotated="val/"):
    """Also a line of the user's list, eigen.txt."""
    picture, truth, _ = kitti_line(name).split()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "eigen.txt", "a") as file:
        file.write(kitti_line(name) + "\n")
    return {
        "image": save(root / f"{raw}{picture}", image),
        "depth": save(root / f"{annotated}{truth}", counts(depth, 256)),
    }


def write_eth3d(root, name, depth, image, packed=False):
    scene, stem = name.split("/")
    pictures = root / ("rgb" if packed else "") / scene
    truths = root / (f"depth/{scene}_dslr_depth" if packed else "") / scene
    path = truths / f"ground_truth_depth/dslr_images/{stem}.JPG"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.where(depth == 0, np.inf, depth).astype("<f4").tofile(path)
    return {"image": save(pictures / f"images/dslr_images/{stem}.JPG", image), "depth": path}


def write_scannet(root, name, depth, image, folder="", digits=1):
    scan, frame = name.split("/")
    stem = f"{int(frame):0{digits}d}"
    return {
        "image": save(root / folder / scan / f"color/{stem}.jpg", image),
        "depth": save(root / folder / scan / f"depth/{stem}.png", counts(depth, 1000)),
    }


def write_diode(root, name, depth, image, folder="val", mask=None):
    start = root / folder / name
    mask = depth > 0 if mask is None else mask
    ends = {
        ".png": image,
        "_depth.npy": depth.astype(np.float32)[..., None],
        "_depth_mask.npy": mask.astype(np.float64),
    }
    paths = [save(start.with_name(start.name + end), array) for end, array in ends.items()]
    return dict(zip(("image", "depth", "mask"), paths, strict=True))


def ibims_masks(shape=SHAPE):
    """mask_invalid, mask_transp, edges: a pixel each, [2,3], [4,5] and [6,7]."""
    masks = np.ones((2, *shape), np.uint8)
    masks[0, 2, 3] = masks[1, 4, 5] = 0
    edges = np.zeros(shape, np.uint8)
    edges[6, 7] = 1
    return dict(zip(("mask_invalid", "mask_transp", "edges"), [*masks, edges], strict=True))


def write_ibims(root, name, depth, image, folder="ibims1_core_raw"):
    arrays = {"rgb": image, "depth": counts(depth, 65535 / 50)}
    arrays |= {kind: array.astype(bool) for kind, array in ibims_masks(depth.shape).items()}
    paths = {k: save(root / folder / k / f"{name}.png", array) for k, array in arrays.items()}
    return {"image": paths.pop("rgb")} | paths


def write_ibims_mat(path, depth, image, without=()):
    data = {"rgb": image, "depth": depth, "calib": np.eye(3), **ibims_masks(depth.shape)}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {key: value for key, value in data.items() if key not in without}
    scipy.io.savemat(path, {"data": data}, do_compression=True)
    return path


def write_nyu_mat(root, scenes, raw, filled, images, test=(), train=()):
    """nyu_depth_v2_labeled.mat of version 7.3, columns first, and splits.mat of version 5.

    raw, filled: [N,H,W]; images: [N,H,W,3]; test, train: frames counted from 1.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        for key, array in (("rawDepths", raw), ("depths", filled)):
            array = np.asarray(array, np.float32).swapaxes(1, 2)
            file.create_dataset(key, data=array, chunks=(1, *array.shape[1:]), compression="gzip")
        array = np.asarray(images).transpose(0, 3, 2, 1)
        file.create_dataset("images", data=array, chunks=(1, *array.shape[1:]), compression="gzip")
        references = file.create_dataset("scenes", (1, len(scenes)), h5py.ref_dtype)
        for i, scene in enumerate(scenes):
            letters = np.array([[ord(letter)] for letter in scene], np.uint16)
            references[0, i] = file.create_dataset(f"#refs#/{i}", data=letters).ref
    indices = {"trainNdxs": train, "testNdxs": test}
    columns = {key: np.array(values, np.uint16)[:, None] for key, values in indices.items()}
    scipy.io.savemat(root / "splits.mat", columns)
    return path


WRITERS = {
    "nyu": write_nyu,
    "kitti": write_kitti,
    "eth3d": write_eth3d,
    "scannet": write_scannet,
    "diode": write_diode,
    "ibims": write_ibims,
}
