// Stands between Fleetkey and a PKCS#11 library, as a token that is slow or does not answer. FLEETKEY_TOKEN_LIBRARY: the library; FLEETKEY_TOKEN_MOOD: a
// file with "delay MS" (each signature takes so long) or "fail" (signatures fail as if the device were gone); FLEETKEY_TOKEN_LOGINS: each login adds a byte.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <unistd.h>
#include <pkcs11/pkcs11.h>

static CK_FUNCTION_LIST real;
static CK_FUNCTION_LIST ours;

static CK_RV sign(CK_SESSION_HANDLE session, CK_BYTE_PTR data, CK_ULONG length, CK_BYTE_PTR out, CK_ULONG_PTR outLength)
{
  char mood[32] = {0};
  if (const char *path = getenv("FLEETKEY_TOKEN_MOOD"))
    if (FILE *file = fopen(path, "r"))
    {
      if (fgets(mood, sizeof mood, file) == nullptr)
        mood[0] = 0;
      fclose(file);
    }
  int delay = 0;
  if (sscanf(mood, "delay %d", &delay) == 1)
    usleep(1000 * delay);
  if (strncmp(mood, "fail", 4) == 0)
    return CKR_DEVICE_ERROR;
  return real.C_Sign(session, data, length, out, outLength);
}

static CK_RV login(CK_SESSION_HANDLE session, CK_USER_TYPE user, CK_UTF8CHAR_PTR pin, CK_ULONG length)
{
  if (const char *path = getenv("FLEETKEY_TOKEN_LOGINS"))
    if (FILE *file = fopen(path, "a"))
    {
      fputc('.', file);
      fclose(file);
    }
  return real.C_Login(session, user, pin, length);
}

extern "C" __attribute__((visibility("default"))) CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list)
{
  void *library = dlopen(getenv("FLEETKEY_TOKEN_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    return CKR_GENERAL_ERROR;
  auto get = reinterpret_cast<CK_C_GetFunctionList>(dlsym(library, "C_GetFunctionList"));
  CK_FUNCTION_LIST_PTR found;
  CK_RV rv = get == nullptr ? CKR_GENERAL_ERROR : get(&found);
  if (rv != CKR_OK)
    return rv;
  real = ours = *found;
  ours.C_Sign = sign;
  ours.C_Login = login;
  *list = &ours;
  return CKR_OK;
}
