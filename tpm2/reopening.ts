import { TpmFormatError } from './bytes.ts'
import { TpmTransportError } from './errors.ts'
import type { Transport } from './transport.ts'

/**
 * A transport that comes back: after a failure the next command opens another one. What was loaded in the TPM may be gone by then, and the caller has to be
 * prepared for that. `first`: the one that is open already.
 */
export const reopening = (open: () => Promise<Transport>, first: Transport): Transport => {
  let current: Transport | undefined = first
  let closed = false
  const drop = async (): Promise<void> => {
    const old = current
    current = undefined
    await old?.close().catch(() => undefined)
  }
  return {
    get managed() {
      return current?.managed ?? first.managed ?? false
    },
    async send(command) {
      if (closed) throw new TpmTransportError('TPM: closed')
      if (current?.isBroken === true) await drop()
      current ??= await open()
      try {
        const response = await current.send(command)
        if (response.length < 10) throw new TpmFormatError(`a response of ${response.length} bytes`)
        return response
      } catch (error) {
        if (error instanceof TpmTransportError || error instanceof TpmFormatError) await drop()
        throw error
      }
    },
    async close() {
      closed = true
      await drop()
    },
  }
}
