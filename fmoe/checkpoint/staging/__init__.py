"""Files in the making: under names of their own and a journal until all of them are whole."""
