import { join, resolve } from 'node:path'
import { exit, text, type Command } from '../command.ts'
import { InstallError, installPkcs11js, pkcs11js } from '../offline/pkcs11js.ts'

export const kmsCommands: readonly Command[] = [
  {
    name: 'kms install-pkcs11',
    usage: '[--data DIR] [--to DIR] [--tarball FILE]',
    summary: `build pkcs11js ${pkcs11js.version}, which --kms pkcs11 needs, from its published source with the compiler of this machine`,
    args: [0, 0],
    options: { to: { type: 'string' }, tarball: { type: 'string' } },
    run(call) {
      const folder = resolve(text(call, 'to') ?? join(call.data, 'pkcs11js'))
      try {
        const built = installPkcs11js({ folder, tarball: text(call, 'tarball') })
        call.out.result({ folder, version: pkcs11js.version, built }, () => `pkcs11js ${pkcs11js.version} ${built ? 'built in' : 'is in'} ${folder}`)
        return Promise.resolve(exit.ok)
      } catch (error) {
        if (!(error instanceof InstallError)) throw error
        process.stderr.write(`fleetkey: ${error.message}\n`)
        return Promise.resolve(exit.notReady)
      }
    },
  },
]
