#!/bin/sh
# Remove what the service never loads from the packages in folder $1. It is a quarter of their size:
# tests, ONNX Runtime's library for other languages, codecs that imaging/ does not use, and what
# OpenVINO has for other devices and formats.
set -eu
cd "$1"
find . -type d -name tests -prune -exec rm -r {} +
rm onnxruntime/capi/libonnxruntime.so.*
if [ -d openvino ]; then
  rm -r openvino/include openvino/libs/libopenvino_intel_[gn]pu_plugin.so openvino/libs/cache.json \
    openvino/libs/libopenvino_*tensorflow* openvino/libs/libopenvino_[pgj]*_frontend*
fi
cd imagecodecs
find . -name '_*.so' ! -name '_shared*' ! -name '_imcd.*' ! -name '_jpeg8.*' ! -name '_jpegls.*' \
  ! -name '_jpeg2k.*' ! -name '_zlib.*' ! -name '_deflate.*' ! -name '_ccitt.*' -delete
# Libraries that no codec is linked to any more.
for library in ../imagecodecs.libs/*; do
  ldd ./*.so | grep -q "${library##*/}" || rm "$library"
done
