/* What TensorRT's Python module looks for in TensorRT's libraries when it is imported. It is there, and does nothing: enough to look
 * at the module's names and signatures, and to call none of them. Built by record_api.py as libnvinfer, libnvinfer_plugin and
 * libnvonnxparser, of whichever version the module asks for. */

#include <stddef.h>

void *createInferBuilder_INTERNAL(void *logger, int version) { (void)logger; (void)version; return NULL; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { (void)engine; (void)logger; (void)version; return NULL; }
void *createInferRuntime_INTERNAL(void *logger, int version) { (void)logger; (void)version; return NULL; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { (void)network; (void)logger; (void)version; return NULL; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { (void)refitter; (void)logger; (void)version; return NULL; }
void *getBuilderPluginRegistry(int capability) { (void)capability; return NULL; }
void *getPluginRegistry(void) { return NULL; }
int getNvOnnxParserVersion(void) { return 0; }
unsigned char initLibNvInferPlugins(void *logger, const char *name_space) { (void)logger; (void)name_space; return 0; }
